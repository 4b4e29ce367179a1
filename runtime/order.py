"""One number for (value, token id) that sorts like the pair: larger values first, and the smaller id on ties.

With it a row's best candidates, its cut-off and its winner are found by comparing integers, and no tie is left to chance.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.int64]
Some = TypeVar("Some", Keys, Tensor)

NONE = -(2**63)  # below every key
_LAST = 2**31 - 1  # the largest token id


def keys_of(values: Tensor, ids: Tensor) -> Tensor:
    """values: any float type up to 32 bits, never NaN; ids: int64, below 2^31; they broadcast. Returns int64 keys."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: a negative zero is a zero
    ordered = (bits ^ ((bits >> 31) & _LAST)).long()  # an integer that sorts as the float does
    return (ordered << 32) + (_LAST - ids)


def ids_of(keys: Some) -> Some:
    """The token ids of keys."""
    return _LAST - (keys & 0xFFFFFFFF)


def values_of(keys: Keys) -> NDArray[np.float32]:
    """The values of keys, float32."""
    ordered = (keys >> 32).astype(np.int32)
    return (ordered ^ ((ordered >> 31) & _LAST)).view(np.float32)


def values_in(keys: Tensor) -> Tensor:
    """The values of keys on a device, float32; NaN of NONE."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & _LAST)).view(torch.float32)


def lowest_keys(values: Tensor) -> Tensor:
    """The smallest keys of any tokens whose values, float32, are at least these, float64; any shape."""
    bounds = values.float()
    bounds = torch.where(bounds.double() < values, torch.nextafter(bounds, torch.full_like(bounds, torch.inf)), bounds)
    return keys_of(bounds, torch.full_like(bounds, _LAST, dtype=torch.int64))


def best_keys(keys: Tensor, count: int) -> Tensor:
    """The `count` largest of every row [R, W], in order; NONE fills up rows that are shorter."""
    found = keys.topk(min(count, keys.shape[1]), dim=1).values
    return torch.nn.functional.pad(found, (0, count - found.shape[1]), value=NONE)
