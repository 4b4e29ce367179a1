"""Where a scale of a linear's inputs can be taken back: found by trying, not by a module's name.

A module that runs before - a norm with a weight for each channel, or a linear with an output for each - makes a linear's
input if dividing its channels by a scale and multiplying the linear's inputs by it leaves the layer's output as it was.
The architecture needn't be known for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

ROOM = 1e-3  # of the output's root mean square: rounding stays far below, another function doesn't


def divide(producer: nn.Module, scale: Tensor) -> None:
    """Divides a producer's output channels by a scale [K], in place."""
    for parameter in (producer.weight, getattr(producer, "bias", None)):
        if isinstance(parameter, Tensor):
            parameter.data = parameter.data / (scale[:, None] if parameter.dim() == 2 else scale)


def multiply(consumers: Sequence[nn.Linear], scale: Tensor) -> None:
    """Multiplies linears' inputs by a scale [K], in place."""
    for linear in consumers:
        linear.weight.data = linear.weight.data * scale


def find_producer(before: Sequence[nn.Module], consumers: Sequence[nn.Linear], run: Callable[[], Tensor]) -> nn.Module | None:
    """The last of the modules that ran before and makes the consumers' input; None if none does.

    `run` gives the layer's output on some calibration. All weights are float32; they are left as they were.
    """
    width = consumers[0].in_features
    fitting = [producer for producer in reversed(before) if len(producer.weight) == width]  # type: ignore[arg-type]
    if not fitting:
        return None
    expected = run()
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(width, generator=generator) + 0.5).to(expected.device)
    room = ROOM * float(expected.float().square().mean().sqrt())
    for producer in fitting:
        saved = [(p, p.data) for module in (producer, *consumers) for p in module.parameters(recurse=False)]
        divide(producer, scale)
        multiply(consumers, scale)
        off = float((run() - expected).float().abs().max())
        for parameter, data in saved:
            parameter.data = data
        if off < room:
            return producer
    return None


def producers(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a layer that may make a linear's input: linears, and modules with nothing but a weight per channel."""
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) or (isinstance(weight, Tensor) and weight.dim() == 1):
            yield module
