"""Which linears of a checkpoint are stored in four or eight bits, and how: `quantization_config`, understood.

Three families of files are read as they are: compressed-tensors (`pack-quantized`, and `int-quantized` where only
weights are), GPTQ (both of its ways to write zero points) and AWQ. Whatever a configuration asks for beyond that is
refused by name: to guess would be to compute with wrong weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, NoReturn

from torch import nn

from runtime.checkpoint import ModelError
from runtime.experts import plain_linears

CHANNEL_GROUP = 128  # a scale for a whole channel is held as equal scales of groups of so many inputs, or of a divisor
GPTQ_FORMATS = ("gptq", "gptq_v2")
COMPRESSED = {"pack-quantized": "pack-quantized", "int-quantized": "int-quantized", "naive-quantized": "int-quantized"}
WORD = 32  # bits


@dataclass(frozen=True)
class Scheme:
    """How one linear's weight is stored.

    layout: `pack-quantized`, `int-quantized`, `gptq`, `gptq_v2` or `awq`. bits: of a code, 4 or 8. group_size: of the
    weight once read, a multiple of 8. channel: the file has one scale for all inputs of an output. symmetric: the file
    has no zero points.
    """

    layout: str
    bits: int
    group_size: int = 0
    symmetric: bool = False
    channel: bool = False

    @property
    def codes_per_word(self) -> int:
        return WORD // self.bits

    def tensors(self, path: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what must be stored of a linear of these dimensions."""
        groups = 1 if self.channel else inputs // self.group_size
        words = -(-outputs // self.codes_per_word)
        if self.layout == "int-quantized":
            found = {"weight": (outputs, inputs), "weight_scale": (outputs, groups)}
            if not self.symmetric:
                found["weight_zero_point"] = (outputs, groups)
        elif self.layout == "pack-quantized":
            found = {"weight_packed": (outputs, -(-inputs // self.codes_per_word)), "weight_scale": (outputs, groups)}
            if not self.symmetric:
                found["weight_zero_point"] = (words, groups)
        else:
            packed = (inputs, words) if self.layout == "awq" else (inputs // self.codes_per_word, outputs)
            found = {"qweight": packed, "scales": (groups, outputs), "qzeros": (groups, words)}
        return {f"{path}.{name}": shape for name, shape in found.items()}

    def integers(self, path: str) -> dict[str, str]:
        """What is stored as integers of those, and safetensors' name for their kind."""
        kind = "I8" if self.layout == "int-quantized" else "I32"
        return {f"{path}.{name}": kind for name in ("weight", "weight_packed", "weight_zero_point", "qweight", "qzeros")}

    def order(self, path: str) -> str:
        """The tensor that gives each input its group, where activations set the order; a file may be without."""
        return f"{path}.weight_g_idx" if self.layout in COMPRESSED else f"{path}.g_idx"

    def companions(self, path: str) -> set[str]:
        """Names that may be stored too. A bias of zeros is what old GPTQ files have where the model has none."""
        return {self.order(path), f"{path}.weight_shape"} | ({f"{path}.bias"} if self.layout in GPTQ_FORMATS else set())


def read_schemes(
    raw: Mapping[str, Any], module: nn.Module, stored: Iterable[str], tied: Iterable[str] = ()
) -> dict[str, Scheme]:
    """The scheme of every linear that is stored quantised, by path; empty without a `quantization_config`.

    raw: config.json. module: the skeleton. stored: the checkpoint's tensors. tied: weights that are another one. Raises
    ModelError for a configuration that isn't understood, naming the key, and for a linear whose inputs don't divide into
    its groups.
    """
    given = raw.get("quantization_config") or raw.get("compression_config")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ModelError("quantization_config in config.json is no object")
    others = set(tied)
    linears = {path: linear for path, linear in plain_linears(module).items() if f"{path}.weight" not in others}
    method = given.get("quant_method")
    if method == "compressed-tensors":
        found = _compressed(given, linears)
    elif method in ("gptq", "awq"):
        # Their configurations say nothing about which linears are packed, or not reliably: the tensors do.
        scheme = _gptq(given) if method == "gptq" else _awq(given)
        names = set(stored)
        kept = given.get("modules_to_not_convert") or []
        found = {path: scheme for path in linears if f"{path}.qweight" in names}
        wrong = next((path for path in found for part in kept if _inside(part, path)), None)
        if wrong:
            raise ModelError(f"quantization_config.modules_to_not_convert names {wrong}, and yet it is stored quantised")
    else:
        _refuse("quant_method", method, "compressed-tensors, gptq and awq")
    return {path: _sized(scheme, path, linears[path].in_features) for path, scheme in found.items()}


def _sized(scheme: Scheme, path: str, inputs: int) -> Scheme:
    if scheme.channel:
        scheme = replace(scheme, group_size=gcd(inputs, CHANNEL_GROUP))
    if scheme.group_size % 8 or inputs % scheme.group_size:
        raise ModelError(
            f"{path} has {inputs} inputs, which don't divide into groups of {scheme.group_size} (a multiple of 8 is needed)"
        )
    return scheme


def _gptq(given: Mapping[str, Any]) -> Scheme:
    _only(given, "bits", 4, 8)
    _only(given, "pack_dtype", None, "int32")
    _only(given, "dynamic", None, {})
    layout = given.get("checkpoint_format") or "gptq"
    if layout not in GPTQ_FORMATS:
        _refuse("checkpoint_format", layout, " and ".join(GPTQ_FORMATS))
    return _grouped(Scheme(layout, given["bits"]), given.get("group_size"))


def _awq(given: Mapping[str, Any]) -> Scheme:
    _only(given, "bits", 4)
    _only(given, "version", None, "gemm", "GEMM")
    _only(given, "zero_point", None, True)
    return _grouped(Scheme("awq", given["bits"]), given.get("group_size"))


def _compressed(given: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> dict[str, Scheme]:
    """https://github.com/vllm-project/compressed-tensors: groups of targets, each with its way to be quantised."""
    _only(given, "format", None, "mixed-precision", *COMPRESSED)
    _only(given, "kv_cache_scheme", None)
    _only(given, "transform_config", None, {})
    _only(given.get("sparsity_config") or {}, "format", None, "dense", where="sparsity_config.")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", groups, "an object with one group or more")
    usual = given.get("format")
    schemes = [(group.get("targets") or [], _group(name, group, usual)) for name, group in groups.items()]
    ignored = given.get("ignore") or []
    found: dict[str, Scheme] = {}
    for path in linears:
        if any(_targets(entry, path) for entry in ignored):
            continue
        # A linear's own name wins over a pattern, and a pattern over the class: compressed-tensors' order.
        for kind in (str.__eq__, _matches, lambda entry, _: entry == "Linear"):
            scheme = next((s for targets, s in schemes if any(kind(entry, path) for entry in targets)), None)
            if scheme:
                found[path] = scheme
                break
    return found


def _group(name: str, group: Mapping[str, Any], usual: str | None) -> Scheme:
    """usual: the format of groups that name none."""
    where = f"config_groups.{name}."
    for key in ("input_activations", "output_activations"):
        _only(group, key, None, where=where)
    _only(group, "format", None, *COMPRESSED, where=where)
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        _refuse(f"{where}weights", weights, "an object")
    where += "weights."
    _only(weights, "num_bits", 4, 8, where=where)
    _only(weights, "type", None, "int", where=where)
    _only(weights, "dynamic", None, False, where=where)
    _only(weights, "block_structure", None, where=where)
    _only(weights, "actorder", None, "weight", "static", "group", "dynamic", False, True, where=where)
    _only(weights, "strategy", "group", "channel", where=where)
    layout = COMPRESSED.get(group.get("format") or usual or "", "pack-quantized")
    scheme = Scheme(layout, weights["num_bits"], symmetric=weights.get("symmetric", True) is True)
    return _grouped(scheme, -1 if weights["strategy"] == "channel" else weights.get("group_size"), where)


def _grouped(scheme: Scheme, size: object, where: str = "") -> Scheme:
    if size == -1:
        return replace(scheme, channel=True)
    if not isinstance(size, int) or isinstance(size, bool) or size < 8:
        _refuse(f"{where}group_size", size, "-1 or a multiple of 8")
    return replace(scheme, group_size=size)


def _only(given: Mapping[str, Any], key: str, *allowed: object, where: str = "") -> None:
    if given.get(key) not in allowed:
        _refuse(f"{where}{key}", given.get(key), " or ".join(str(value) for value in allowed if value is not None) or "none")


def _refuse(key: str, value: object, known: str) -> NoReturn:
    raise ModelError(
        f"quantization_config.{key} in config.json is {value!r}; read here: {known}. Use a checkpoint of that kind, or the "
        "plain 16-bit one, which is quantised while it loads"
    )


def _targets(entry: str, path: str) -> bool:
    return entry in (path, "Linear") or _matches(entry, path)


def _matches(entry: str, path: str) -> bool:
    return entry.startswith("re:") and re.match(entry.removeprefix("re:"), path) is not None


def _inside(part: str, path: str) -> bool:
    """AWQ's list has parts of paths: a linear stays as it is if one of them stands in its path, in whole words."""
    return f".{part}." in f".{path}."
