"""One layer of a model into four bits, from what calibration sends through it.

Linears are taken in the order the layer calls them, those with one input together, and each sees what the layers and
linears before it, already in four bits, make of the calibration. GPTQ sees beside it what they would have made of it in
full precision: so that later linears mend what earlier ones broke.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from runtime.quantize.awq import clipped, search_scale
from runtime.quantize.folding import find_producer, multiply, producers
from runtime.quantize.gptq import DAMPING, compensated, gptq
from runtime.quantize.int4 import Int4Weight, quantize

METHODS = ("rtn", "gptq", "awq", "awq+gptq")
Run = Callable[[nn.Module], Tensor]  # one window of calibration through a layer: its output


@dataclass(frozen=True)
class Recipe:
    """How weights are rounded: to nearest (rtn), by GPTQ, by AWQ, or by GPTQ after AWQ's scales."""

    method: Literal["rtn", "gptq", "awq", "awq+gptq"]
    group_size: int
    symmetric: bool
    activation_order: bool = True
    damping: float = DAMPING


@dataclass
class Moments:
    """What is known of a linear's inputs x: the mean of x x^T and, with y what they are in full precision, of y x^T, float32
    [K, K], and of |x|, float32 [K]."""

    second: Tensor
    cross: Tensor
    magnitude: Tensor
    count: int = 0

    def add(self, x: Tensor, true: Tensor) -> None:
        """Inputs [T, K] float32 as they are and as they would be."""
        self.count += len(x)
        self.second += (x.t() @ x - self.second * len(x)) / self.count
        self.cross += (true.t() @ x - self.cross * len(x)) / self.count
        self.magnitude += (x.abs().sum(0) - self.magnitude * len(x)) / self.count


@dataclass(frozen=True)
class Stage:
    """Linears with one input, by path within the layer, and the modules that were called before them."""

    paths: list[str]
    before: list[nn.Module]


def quantize_layer(
    layer: nn.Module, runs: Sequence[Run], plain: Sequence[Run], recipe: Recipe, dtype: torch.dtype
) -> dict[str, Int4Weight]:
    """Rounds every linear of a layer whose weights are float32; the layer then holds the values that four bits leave.

    runs: the windows of calibration as the layers before, in four bits, hand them on; plain: as they would in full
    precision. All methods but rtn need them. dtype: what norms and biases are stored in. Holds a second copy of the layer.
    Returns the weights by path within the layer. Raises ValueError for groups that don't fit, NotFactored.
    """
    linears = {path: m for path, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if recipe.method == "rtn":
        return {path: _take(m, quantize(m.weight.data, recipe.group_size, recipe.symmetric)) for path, m in linears.items()}
    stages = survey(layer, runs[0])
    if recipe.method.startswith("awq"):
        seen = collect(layer, layer, [stage.paths[0] for stage in stages], runs, runs)
        for stage in stages:
            consumers = [linears[path] for path in stage.paths]
            producer = find_producer(stage.before, consumers, lambda: runs[0](layer))
            if producer is not None:
                moments, weights = seen[stage.paths[0]], [m.weight.data for m in consumers]
                scale = search_scale(weights, moments.second, moments.magnitude, recipe.group_size, recipe.symmetric)
                multiply(consumers, _fold(producer, scale, dtype))
    whole = copy.deepcopy(layer)
    made: dict[str, Int4Weight] = {}
    for stage in stages:
        moments = collect(layer, whole, [stage.paths[0]], runs, plain)[stage.paths[0]]
        for path in stage.paths:
            weight = linears[path].weight.data
            if recipe.method == "awq":
                four = clipped(weight, moments.second, recipe.group_size, recipe.symmetric)
            else:
                four = gptq(
                    compensated(weight, moments.second, moments.cross, recipe.damping), moments.second,
                    recipe.group_size, recipe.symmetric, activation_order=recipe.activation_order, damping=recipe.damping,
                )  # fmt: skip
            made[path] = _take(linears[path], four)
    for path in set(linears) - set(made):  # never called by this calibration
        made[path] = _take(linears[path], quantize(linears[path].weight.data, recipe.group_size, recipe.symmetric))
    return made


def survey(layer: nn.Module, run: Run) -> list[Stage]:
    """In which order the layer calls its linears, and which of them share an input."""
    paths = {module: path for path, module in layer.named_modules()}
    stages: list[Stage] = []
    called: list[nn.Module] = []
    inputs: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            known = next((i for i, x in enumerate(inputs) if x is args[0]), None)
            if known is None:
                inputs.append(args[0])
                stages.append(Stage([paths[module]], list(called)))
            else:
                stages[known].paths.append(paths[module])
        called.append(module)

    hooks = [module.register_forward_pre_hook(look) for module in producers(layer)]
    try:
        run(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def collect(
    layer: nn.Module, whole: nn.Module, paths: Sequence[str], runs: Sequence[Run], plain: Sequence[Run]
) -> dict[str, Moments]:
    """The moments of these linears' inputs over all windows. whole: the layer in full precision, for `plain`."""
    found: dict[str, Moments] = {}
    for run, true_run in zip(runs, plain, strict=True):
        seen = inputs_of(layer, paths, run)
        true = seen if whole is layer else inputs_of(whole, paths, true_run)
        for path in paths:
            x = seen[path]
            if path not in found:
                square = x.new_zeros(x.shape[1], x.shape[1])
                found[path] = Moments(square, square.clone(), x.new_zeros(x.shape[1]))
            found[path].add(x, true[path])
    return found


def inputs_of(layer: nn.Module, paths: Sequence[str], run: Run) -> dict[str, Tensor]:
    """What a window brings to these linears, float32 [T, K] each."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: found[path].append(args[0].detach().reshape(-1, args[0].shape[-1]).float())

    hooks = [layer.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        run(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def _take(linear: nn.Linear, weight: Int4Weight) -> Int4Weight:
    linear.weight.data = weight.dequantize()
    return weight


def _fold(producer: nn.Module, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Divides the producer by the scale. Returns the scale that its channels really got, stored as they are in `dtype`."""
    weight, bias = producer.weight, getattr(producer, "bias", None)
    assert isinstance(weight, nn.Parameter)
    if weight.dim() == 2:  # a linear's channels are rounded to four bits anyway, each with scales of its own
        weight.data = weight.data / scale[:, None]
    else:
        stored = (weight.data / scale).to(dtype).float()
        scale = torch.where(stored != 0, weight.data / stored, scale)
        weight.data = stored
    if isinstance(bias, nn.Parameter):
        bias.data = (bias.data / scale).to(dtype).float()
    return scale
