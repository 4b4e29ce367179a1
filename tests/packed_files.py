"""Checkpoints in others' formats of four and eight bits, their bits spelt out one by one from the formats' descriptions."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

PACKED = ("gate_up_proj", "down_proj")


@dataclass
class Drawn:
    """A random weight: unsigned codes [N, K] of so many bits, scales [N, G], zeros [N, G], the group of each input [K]."""

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor

    @property
    def value(self) -> Tensor:
        """float32 [N, K]."""
        return (self.codes - self.zero[:, self.group_of]).float() * self.scale.float()[:, self.group_of]


def draw(shape: torch.Size, group: int, symmetric: bool, shuffled: bool, dtype: torch.dtype, bits: int = 4) -> Drawn:
    outputs, inputs = shape
    groups = 1 if group == -1 else inputs // group
    group_of = torch.arange(inputs) * groups // inputs
    if shuffled:
        group_of = group_of[torch.randperm(inputs)]
    codes = 2**bits
    zero = torch.full((outputs, groups), codes // 2) if symmetric else torch.randint(0, codes, (outputs, groups))
    scale = ((torch.rand(outputs, groups) + 0.2) * 4.8 / codes * inputs**-0.5).to(dtype)
    return Drawn(bits, torch.randint(0, codes, (outputs, inputs)), scale, zero, group_of)


def words(codes: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """[A, P B] -> int32 [A, B]: the i-th `bits` bits of a word, from its lowest on, hold code places[i] of its P."""
    rows, each = [], 32 // bits
    for row in codes.tolist():
        row += [0] * (-len(row) % each)
        order = places or tuple(range(each))
        rows.append([sum(row[w + place] << bits * i for i, place in enumerate(order)) for w in range(0, len(row), each)])
    unsigned = torch.tensor(rows, dtype=torch.int64)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def compressed(path: str, w: Drawn, symmetric: bool, shuffled: bool, packed: bool = True) -> dict[str, Tensor]:
    found = {f"{path}.weight_scale": w.scale}
    middle = 2 ** (w.bits - 1)
    if packed:
        found |= {f"{path}.weight_packed": words(w.codes, w.bits), f"{path}.weight_shape": torch.tensor(w.codes.shape)}
    else:
        found[f"{path}.weight"] = (w.codes - middle).to(torch.int8)
    if not symmetric:
        zero = words(w.zero.t(), w.bits).t() if packed else (w.zero - middle).to(torch.int8)
        found[f"{path}.weight_zero_point"] = zero
    if shuffled:
        found[f"{path}.weight_g_idx"] = w.group_of.int()
    return found


def gptq(path: str, w: Drawn, version: int) -> dict[str, Tensor]:
    zeros = words(w.zero.t(), w.bits)
    if version == 1:  # a word less one in each of its codes, modulo 2^32
        less = (zeros.long() - {4: 0x11111111, 8: 0x01010101}[w.bits]) % 2**32
        zeros = torch.where(less >= 2**31, less - 2**32, less).int()
    return {
        f"{path}.qweight": words(w.codes, w.bits).t(),
        f"{path}.qzeros": zeros,
        f"{path}.scales": w.scale.t(),
        f"{path}.g_idx": w.group_of.int(),
        f"{path}.bias": torch.zeros(len(w.codes), dtype=w.scale.dtype),
    }


def awq(path: str, w: Drawn) -> dict[str, Tensor]:
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{path}.qweight": words(w.codes.t(), 4, places),
        f"{path}.qzeros": words(w.zero.t(), 4, places),
        f"{path}.scales": w.scale.t(),
    }


def write(
    model: PreTrainedModel, directory: Path, layout: str, group: int, symmetric: bool = False, shuffled: bool = False,
    ignored: tuple[str, ...] = ("lm_head",), rng: random.Random | None = None, bits: int = 4,
    called: Callable[[str], str] = str,
) -> None:  # fmt: skip
    """Writes `model` with random weights of few bits in its linears, and gives the model those weights' values.

    Linears whose name ends with one of `ignored` stay as they are. Siblings share an order of their inputs with even
    odds of `rng`, as they do where one calibration made it. called: what files call a module of transformers'.
    """
    dtype = torch.float16 if layout in ("gptq", "gptq_v2", "awq") else torch.bfloat16
    tensors: dict[str, Tensor] = {}
    replaced: set[str] = set()
    kept: list[str] = []
    orders: dict[tuple[str, int], Tensor] = {}
    for path, weight, bias in linears(model):
        if path.endswith(ignored):
            kept.append(called(path))
            continue
        w = draw(weight.shape, group, symmetric, shuffled, dtype, bits)
        if rng is not None and rng.random() < 0.7:
            w.group_of = orders.setdefault((path.rpartition(".")[0], weight.shape[1]), w.group_of)
        replaced |= {f"{path}.weight", f"{path}.bias"} | {f"{path.rpartition('.experts.')[0]}.experts.{x}" for x in PACKED}
        weight.copy_(w.value)
        path = called(path)
        if layout in ("pack-quantized", "int-quantized"):
            tensors |= compressed(path, w, symmetric, shuffled, layout == "pack-quantized")
        else:
            tensors |= awq(path, w) if layout == "awq" else gptq(path, w, 1 if layout == "gptq" else 2)
        if bias is not None:
            tensors[f"{path}.bias"] = bias
    tensors = {called(n): v.data for n, v in model.named_parameters() if n not in replaced} | tensors
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    save_file({n: v.contiguous() for n, v in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    path_ = directory / "config.json"
    about = config(layout, bits, group, symmetric, shuffled, kept)
    path_.write_text(json.dumps(json.loads(path_.read_text()) | {"quantization_config": about}))


def linears(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Path, weight [N, K] and bias of every linear, experts' among them: in transformers each is a slice of a tensor."""
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            yield path, module.weight.data, None if module.bias is None else module.bias.data
        elif path.endswith(".experts"):
            turned = "Llama4" in type(module).__name__
            packed = [x.data.mT if turned else x.data for x in (module.gate_up_proj, module.down_proj)]
            for index, (gate_up, down) in enumerate(zip(*packed, strict=True)):
                for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
                    yield f"{path}.{index}.{name}", weight, None


def config(layout: str, bits: int, group: int, symmetric: bool, shuffled: bool, kept: list[str]) -> dict[str, Any]:
    if layout == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": [p for p in kept if p != "lm_head"] or None}  # fmt: skip
    if layout in ("gptq", "gptq_v2"):
        return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": symmetric,
                "checkpoint_format": layout, "damp_percent": 0.01, "true_sequential": True}  # fmt: skip
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group",
               "group_size": None if group == -1 else group, "actorder": "group" if shuffled else None,
               "dynamic": False, "observer": "minmax", "block_structure": None, "observer_kwargs": {}}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                                          "output_activations": None}},
            "ignore": kept, "kv_cache_scheme": None}  # fmt: skip
