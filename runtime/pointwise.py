"""Activation functions whose result for an element doesn't depend on where it stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {"transformers.activations", "torch.nn.modules.activation"}
# On a CPU torch computes most elements of a tensor in vectors and the last few, or those at the end of a thread's
# share, one by one, with other roundings in silu, gelu and sigmoid. Whole vectors without threads have no such ends.
VECTOR = 64  # elements: two of the longest vectors
SERIAL = 1 << 14  # elements: torch uses no threads up to here


class Pointwise(nn.Module):
    """An activation function on a CPU, over whole vectors only: [...] -> [...], contiguous."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if more := -len(flat) % VECTOR:
            flat = functional.pad(flat, (0, more))
        parts = [self.inner(part) for part in flat.split(SERIAL)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[: x.numel()].view(x.shape)


def steady(model: nn.Module) -> None:
    """Wraps all activation functions of a model in `Pointwise`, in place."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module).__module__ in ACTIVATIONS:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Pointwise(module))
