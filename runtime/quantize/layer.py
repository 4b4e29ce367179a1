"""One layer of a model into four bits, from what calibration sends through it.

Linears are taken in the order the layer calls them, those with one input together, and each sees what the layers and
linears before it, already in four bits, make of the calibration. GPTQ sees beside it what they would have made of it in
full precision: so that later linears mend what earlier ones broke.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from runtime.experts import Expert, choosing, plain_linears
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
    """Linears with one input, by path within the layer; the modules that were called before them, an expert's own if they
    are of one; and a window in which they were called."""

    paths: list[str]
    before: list[nn.Module]
    run: Run


def quantize_layer(
    layer: nn.Module, runs: Sequence[Run], plain: Sequence[Run], recipe: Recipe, dtype: torch.dtype
) -> tuple[dict[str, Int4Weight], list[str]]:
    """Rounds every linear of a layer whose weights are float32; the layer then holds the values that four bits leave.

    runs: the windows of calibration as the layers before, in four bits, hand them on; plain: as they would in full
    precision. All methods but rtn need them. dtype: what norms and biases are stored in. Holds a second copy of the layer.
    Returns the weights by path within the layer, and which of them calibration never reached: these are rounded to nearest.
    Raises ValueError for groups that don't fit, NotFactored.
    """
    linears = roundable(layer)

    def nearest(path: str) -> Int4Weight:
        return _take(linears[path], quantize(linears[path].weight.data, recipe.group_size, recipe.symmetric))

    if recipe.method == "rtn":
        return {path: nearest(path) for path in linears}, []
    stages = survey(layer, runs)
    if recipe.method.startswith("awq"):
        for batch in batches(layer, stages):
            seen = collect(layer, layer, [stage.paths[0] for stage in batch], runs, runs)
            for stage in batch:
                consumers = [linears[path] for path in stage.paths]
                producer = find_producer(stage.before, consumers, partial(stage.run, layer))
                if producer is not None and stage.paths[0] in seen:
                    moments, weights = seen[stage.paths[0]], [m.weight.data for m in consumers]
                    scale = search_scale(weights, moments.second, moments.magnitude, recipe.group_size, recipe.symmetric)
                    multiply(consumers, _fold(producer, scale, dtype))
    whole = copy.deepcopy(layer)
    made: dict[str, Int4Weight] = {}
    for batch in (batch for alike in together(layer, stages) for batch in batches(layer, alike)):
        seen = collect(layer, whole, [stage.paths[0] for stage in batch], runs, plain)
        reached = [stage for stage in batch if stage.paths[0] in seen]
        for path, moments in ((path, seen[stage.paths[0]]) for stage in reached for path in stage.paths):
            weight = linears[path].weight.data
            if recipe.method == "awq":
                four = clipped(weight, moments.second, recipe.group_size, recipe.symmetric)
            else:
                four = gptq(
                    compensated(weight, moments.second, moments.cross, recipe.damping), moments.second,
                    recipe.group_size, recipe.symmetric, activation_order=recipe.activation_order, damping=recipe.damping,
                )  # fmt: skip
            made[path] = _take(linears[path], four)
    unreached = [path for path in linears if path not in made]
    return made | {path: nearest(path) for path in unreached}, unreached


def roundable(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a layer that are rounded, by path: not those of routers, nor such as have fewer outputs than a word."""
    return {path: linear for path, linear in plain_linears(layer).items() if linear.out_features >= 8}


def together(layer: nn.Module, stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages none of which feeds another stand together: those of different experts, else each by itself."""
    alike: dict[tuple[str, int], list[Stage]] = {}
    stages_of: Counter[str] = Counter()
    for stage in stages:
        owner = stage.paths[0].rpartition(".")[0]
        of_expert = isinstance(layer.get_submodule(owner), Expert)
        key = owner.rpartition(".")[0] if of_expert else stage.paths[0], stages_of[owner]
        stages_of[owner] += 1
        alike.setdefault(key, []).append(stage)
    return list(alike.values())


def batches(layer: nn.Module, stages: Sequence[Stage]) -> list[list[Stage]]:
    """As many stages at a time as have moments that take no more memory than the layer and its copy."""
    linears, room = roundable(layer), 2 * sum(parameter.numel() for parameter in layer.parameters())
    made: list[list[Stage]] = []
    left = 0
    for stage in stages:
        left -= (needed := 2 * linears[stage.paths[0]].in_features ** 2)
        if left < 0:
            made.append([])
            left = room - needed
        made[-1].append(stage)
    return made


def survey(layer: nn.Module, runs: Sequence[Run]) -> list[Stage]:
    """In which order the layer calls its linears, and which of them share an input. Windows are run until all are known."""
    stages: list[Stage] = []
    known: set[str] = set()
    for run in runs:
        if len(known) < len(roundable(layer)):
            stages += [stage for stage in _stages(layer, run) if known.isdisjoint(stage.paths)]
            known.update(path for stage in stages for path in stage.paths)
    return stages


def _stages(layer: nn.Module, run: Run) -> list[Stage]:
    paths = {module: path for path, module in roundable(layer).items()}
    owners = {inner: expert for expert in layer.modules() if isinstance(expert, Expert) for inner in expert.modules()}
    stages: list[Stage] = []
    called: list[nn.Module] = []
    inputs: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module in paths:
            known = next((i for i, x in enumerate(inputs) if x is args[0]), None)
            if known is None:
                inputs.append(args[0])
                before = [other for other in called if owners.get(other) is owners.get(module)]
                stages.append(Stage([paths[module]], before, run))
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
    """The moments of these linears' inputs over all windows, of those that get any. whole: the layer in full precision, for
    `plain`; its experts get the rows that are sent to the layer's."""
    found: dict[str, Moments] = {}
    for run, true_run in zip(runs, plain, strict=True):
        choices: list[tuple[Tensor, ...]] = []
        with choosing(layer, choices):
            seen = inputs_of(layer, paths, run)
        with choosing(whole, choices, again=True):
            true = seen if whole is layer else inputs_of(whole, paths, true_run)
        for path in seen:
            x = seen[path]
            if path not in found:
                square = x.new_zeros(x.shape[1], x.shape[1])
                found[path] = Moments(square, square.clone(), x.new_zeros(x.shape[1]))
            found[path].add(x, true[path])
    return found


def inputs_of(layer: nn.Module, paths: Sequence[str], run: Run) -> dict[str, Tensor]:
    """What a window brings to those of these linears that are called, float32 [T, K] each."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: found[path].append(args[0].detach().reshape(-1, args[0].shape[-1]).float())

    hooks = [layer.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        run(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in found.items() if parts}


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
