"""Puts new keys and values into the paged cache."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.arguments import check_write


@triton.jit
def _write(
    key, value, keys, values, slots, spaces, key_token, key_head, value_token, value_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    h, d = tl.arange(0, TILE_H)[:, None], tl.arange(0, TILE_D)[None, :]
    inside = (h < HEADS) & (d < DIM)
    if (slot >= 0) & (slot < spaces):
        place = ((slot // SIZE * HEADS + h) * SIZE + slot % SIZE) * DIM + d
        tl.store(keys + place, tl.load(key + token * key_token + h * key_head + d, mask=inside), mask=inside)
        tl.store(values + place, tl.load(value + token * value_token + h * value_head + d, mask=inside), mask=inside)


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    check_write(key, value, key_cache, value_cache, slots)
    if not key.numel():
        return
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    blocks, heads, size, dim = key_cache.shape
    _write[(len(key),)](
        key, value, key_cache, value_cache, slots.contiguous(), blocks * size,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), HEADS=heads, DIM=dim, SIZE=size,
        TILE_H=triton.next_power_of_2(heads), TILE_D=triton.next_power_of_2(dim),
    )  # fmt: skip
