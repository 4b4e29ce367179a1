"""Kernels for who doesn't need the same bits in every batch: libraries add as they like, where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

MANY = 64  # rows from which on a library's product is the faster one


def loosened(kernels: ModuleType) -> ModuleType:
    """A module's kernels, but for 16-bit products of many rows, and without sums over segments."""
    own = kernels.dense_linear

    def dense_linear(x: Tensor, weight: Tensor, borders: Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
        if len(x) < MANY:
            out: Tensor = own(x, weight, (), dtype)
            return out
        return functional.linear(x, weight).to(dtype or x.dtype)

    loose = ModuleType(f"{kernels.__name__}.loose")
    vars(loose).update(vars(kernels), dense_linear=dense_linear, SEGMENTS=False)
    return loose
