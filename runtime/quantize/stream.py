"""A whole model into four bits, one layer in memory at a time; what is finished stays finished.

The architecture runs once, with all of calibration twice in one batch - as full precision has it and as four bits have
it - and at each layer stops to load, round and write it. So layers get from transformers exactly the arguments they
always get, and nothing here knows their names.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.checkpoint import DTYPES, INDEX, Checkpoint, ModelError, read_json
from runtime.experts import routers_of
from runtime.quantize.layer import Recipe, Run, quantize_layer, roundable
from runtime.quantize.output import mark, names_in, save, write
from runtime.quantize.source import decoder_layers, open_source
from runtime.quantize.written import description, expanded, packed_tensors
from runtime.skeleton import path_of

log = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def quantize_model(
    source: Path, output: Path, recipe: Recipe, windows: Tensor | None, *,
    device: torch.device | str = "cpu", on_layer: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Reads the model directory `source` and writes `output`, a model directory in `pack-quantized` format.

    windows: calibration, token ids int64 [S, T]; none for rtn. It keeps 2 S * T hidden states in float32, and one layer
    in full precision and in four bits.
    on_layer: called with the layers done and all of them. Run again, it goes on where it stopped. Raises ModelError;
    OSError where the output cannot be written.
    """
    module, checkpoint = open_source(source)
    try:
        layers = decoder_layers(module)
        output.mkdir(parents=True, exist_ok=True)
        mark(output, recipe, checkpoint.digest, windows)
        writer = _Writer(module, layers, checkpoint, output, recipe, torch.device(device), on_layer or (lambda *_: None))
        if not (output / INDEX).exists():
            writer.work(windows)
            writer.finish()
    finally:
        checkpoint.close()


class _Writer:
    def __init__(
        self, module: PreTrainedModel, layers: nn.ModuleList, checkpoint: Checkpoint, output: Path, recipe: Recipe,
        device: torch.device, on_layer: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.module, self.layers, self.checkpoint, self.output = module, layers, checkpoint, output
        self.recipe, self.device, self.on_layer = recipe, device, on_layer
        self.prefix = path_of(module, layers)
        self.packed = {f"{self.prefix}.{i}.{path}" for i, layer in enumerate(layers) for path in roundable(layer)}

    @torch.no_grad()
    def work(self, windows: Tensor | None) -> None:
        """Writes every layer's file."""
        real = list(self.layers)
        if self.recipe.method == "rtn" or windows is None:
            for index in range(len(real)):
                self.load(real[index], index)
                self.step(index, real[index], [], [])
                real[index].to("meta")
            return
        for owner in self.module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    owner._buffers[name] = buffer.to(self.device)
        embedding = self.module.get_input_embeddings()
        embedding.weight = nn.Parameter(self._read(f"{path_of(self.module, embedding)}.weight"), requires_grad=False)
        for index, layer in enumerate(real):
            self.layers[index] = _Step(index, layer, self)
        try:
            self.module.base_model(input_ids=windows.repeat(2, 1).to(self.device), use_cache=False)
        except _Done:
            pass
        finally:
            for index, layer in enumerate(real):
                self.layers[index] = layer

    def names(self, layer: nn.Module, index: int) -> dict[str, str]:
        """A layer's tensors: names within it, and in the checkpoint."""
        prefix = f"{self.prefix}.{index}."
        names = {name: f"{prefix}{name}" for name, _ in layer.named_parameters()}
        return names | {name: f"{prefix}{name}" for name in layer.state_dict() if f"{prefix}{name}" in self.checkpoint.shapes}

    def load(self, layer: nn.Module, index: int) -> None:
        """Gives the layer its weights in full precision."""
        for name, full in self.names(layer, index).items():
            _put(layer, name, self._read(full))

    def step(self, index: int, layer: nn.Module, runs: list[Run], plain: list[Run]) -> None:
        """Leaves a loaded layer as four bits make it, its file written."""
        path = self.output / self.file(index)
        names = self.names(layer, index)
        if path.exists():
            tensors = load_file(path)
            for name, full in names.items():
                stored = self.checkpoint.stored_name(full)
                if full.removesuffix(".weight") in self.packed:
                    value = expanded(stored.removesuffix(".weight"), tensors, self.recipe.group_size)
                else:
                    value = tensors[stored].float()
                _put(layer, name, value.to(self.device))
        else:
            prefix = f"{self.prefix}.{index}."
            dtype = DTYPES[self.checkpoint.dtypes[next(iter(names.values()))]]
            try:
                made, unreached = quantize_layer(layer, runs, plain, self.recipe, dtype)
            except ValueError as error:
                raise ModelError(f"{prefix[:-1]} cannot be quantised: {error}; try another --group-size") from error
            if unreached:
                log.warning(
                    "%s: calibration never reached %d of its %d linears, %s among them; these are rounded to nearest, and more "
                    "--samples may reach them", prefix[:-1], len(unreached), len(made), unreached[0],
                )  # fmt: skip
            tensors = {}
            for name, full in names.items():
                kind, linear = DTYPES[self.checkpoint.dtypes[full]], name.removesuffix(".weight")
                stored = self.checkpoint.stored_name(full)
                if linear in made:
                    tensors |= packed_tensors(stored.removesuffix(".weight"), made[linear], self.recipe.symmetric, kind)
                else:
                    tensors[stored] = layer.get_parameter(name).data.to(kind).cpu().contiguous()
            save(tensors, path)
        _give_back()
        self.on_layer(index + 1, len(self.layers))

    def finish(self) -> None:
        """Writes what is outside of layers as it was, and then the files that say what is where."""
        prefix = f"{self.prefix}."
        names = [name for name in self.checkpoint.shapes if not name.startswith(prefix)]
        rest = {self.checkpoint.stored_name(name): self.checkpoint.read(name) for name in names}
        save(rest, self.output / self.file(len(self.layers)))
        files = [self.output / self.file(index) for index in range(len(self.layers) + 1)]
        where = {name: file.name for file in files for name in names_in(file)}
        for file in self.checkpoint.directory.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in (INDEX, "config.json"):
                shutil.copyfile(file, self.output / file.name)
        kept = [path for path, m in self.module.named_modules() if isinstance(m, nn.Linear) and path not in self.packed]
        kept += [path for path, _ in routers_of(self.module) if path not in kept]
        kept = [self.checkpoint.stored_name(f"{path}.weight").removesuffix(".weight") for path in kept]
        about = description(self.recipe.group_size, self.recipe.symmetric, kept)
        config = read_json(self.checkpoint.directory, "config.json") | {"quantization_config": about}
        write(self.output / "config.json", config)
        size = sum(file.stat().st_size for file in files)
        write(self.output / INDEX, {"metadata": {"total_size": size}, "weight_map": where})  # last: now it is whole

    def file(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{len(self.layers) + 1:05}.safetensors"

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device, torch.float32, copy=True)


class _Done(Exception):
    """The last layer is written; what comes after it needn't run."""


class _Step(nn.Module):
    """Stands in a layer's place for the one pass over calibration."""

    def __init__(self, index: int, layer: nn.Module, writer: _Writer) -> None:
        super().__init__()
        self._index, self._writer = index, writer
        self._held = [layer]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        """What models ask of a layer besides calling it, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """hidden: [2 S, T, W], of S windows in full precision, then of the same in four bits. Where a layer gives more than
        hidden states, so does this."""
        layer, count = self._held[0], len(hidden)
        more: set[bool] = set()

        def run(row: int, layer: nn.Module) -> Tensor:
            out = layer(hidden[row : row + 1], *_of_row(args, row, count), **_of_row(kwargs, row, count))
            more.add(isinstance(out, tuple))
            return out[0] if isinstance(out, tuple) else out

        runs: list[Run] = [partial(run, row) for row in range(count)]
        plain, rounded = runs[: count // 2], runs[count // 2 :]
        self._writer.load(layer, self._index)
        last = self._index + 1 == len(self._writer.layers)
        out = [] if last else [run(layer) for run in plain]
        self._writer.step(self._index, layer, rounded, plain)
        if last:
            raise _Done
        out += [run(layer) for run in rounded]
        layer.to("meta")
        return (torch.cat(out), None) if True in more else torch.cat(out)


def _of_row(value: Any, row: int, count: int) -> Any:
    """Arguments that are one for each window, cut down to this one's."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if count > 1 and value.dim() and len(value) == count else value
    if isinstance(value, dict):
        return {name: _of_row(item, row, count) for name, item in value.items()}
    return type(value)(_of_row(item, row, count) for item in value) if type(value) in (tuple, list) else value


def _give_back() -> None:
    """Has glibc return freed memory to the system: it keeps tensors of a few MB in holes that later ones don't fit, and
    those grow with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _put(layer: nn.Module, name: str, value: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    owner = layer.get_submodule(parent)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[last] = value
