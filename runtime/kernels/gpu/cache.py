"""New keys and values on their way into the paged cache, as they are or rounded to eight bits a number.

A row of an eight-bit cache carries its scale behind its codes, as four more bytes. Eight-bit floats are made and read by
operations on integers, as cards before sm_89 have no instruction for them; the kernels see bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.arguments import check_write
from runtime.kernels.gpu.dot import narrow


@triton.jit
def encode(x, FLOAT: tl.constexpr):
    """Rows [R, D] of float32 -> codes int8 [R, D], bits of float8_e4m3fn if FLOAT, and scales float32 [R].

    Zeros may follow a row. See `runtime/kernels/rows.py`.
    """
    MOST: tl.constexpr = 448.0 if FLOAT else 127.0
    bits = x.to(tl.int32, bitcast=True)
    most = tl.max(bits & 0x7FFFFFFF, axis=1)  # as integers, magnitudes are in order, and infinities and NaN come last
    finite = most < 0x7F800000
    amax = most.to(tl.float32, bitcast=True)
    some = finite & (amax >= 7.888609052210118e-31)
    full = tl.full(amax.shape, MOST, tl.float32)
    inverse = tl.div_rn(full, tl.where(some, amax, 1.0))
    scale = tl.where(some, tl.div_rn(amax, full), tl.where(finite, 0.0, float("nan")))
    y = tl.where(some[:, None], x * inverse[:, None], 0.0)
    if FLOAT:
        size = (y.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        u = size.to(tl.int32, bitcast=True)
        code = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - 960  # three bits of the fraction, half to even; exponents from 7 on
        small = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # below 2^-6: steps of 2^-9
        code = tl.where(size < 0.015625, small, code) | ((y.to(tl.int32, bitcast=True) >> 24) & 0x80)
    else:
        code = (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # half to even
    return code.to(tl.int8), scale


@triton.jit
def decode(code, FLOAT: tl.constexpr):
    """int8 codes as float32, exactly and without their scale."""
    if FLOAT:
        byte = code.to(tl.int16)
        half = (byte & -0x8000) | ((byte & 0x7F) << 7)  # the sign of a byte is the sign of what it widens to
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    # Under the exponent of 2^23: converting an integer takes longer.
    return ((code.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def put(x, cache, scales, spot, d, inside, DIM: tl.constexpr, FORM: tl.constexpr):
    """Writes rows [R, D] of float32 to rows `spot` of a cache; inside: [R, D]. FORM: "same", "int8", "fp8"."""
    if FORM == "same":
        tl.store(cache + spot[:, None] * DIM + d[None, :], narrow(x, cache.dtype.element_ty), mask=inside)
    else:
        code, scale = encode(tl.where(inside, x, 0.0), FORM == "fp8")
        tl.store(cache + spot[:, None] * (DIM + 4) + d[None, :], code, mask=inside)
        there = tl.max(inside.to(tl.int32), axis=1) > 0
        tl.store(scales + spot * (DIM // 4 + 1) + DIM // 4, scale, mask=there)


@triton.jit
def _write(
    key, value, keys, values, key_scales, value_scales, slots, spaces, key_token, key_head, value_token, value_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, FORM: tl.constexpr, TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    h, d = tl.arange(0, TILE_H), tl.arange(0, TILE_D)
    inside = (h < HEADS)[:, None] & (d < DIM)[None, :]
    if (slot >= 0) & (slot < spaces):
        spot = (slot // SIZE * HEADS + h) * SIZE + slot % SIZE
        at = h[:, None] * key_head + d[None, :]
        x = tl.load(key + token * key_token + at, mask=inside, other=0.0).to(tl.float32)
        put(x, keys, key_scales, spot, d, inside, DIM, FORM)
        at = h[:, None] * value_head + d[None, :]
        x = tl.load(value + token * value_token + at, mask=inside, other=0.0).to(tl.float32)
        put(x, values, value_scales, spot, d, inside, DIM, FORM)


def raw(cache: Tensor) -> tuple[Tensor, Tensor, str]:
    """A cache as kernels take it: its numbers or bytes, its scales (every so many float32), and their form."""
    if cache.dtype.itemsize > 1:
        return cache, cache, "same"
    return cache.view(torch.int8), cache.view(torch.float32), "int8" if cache.dtype == torch.int8 else "fp8"


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    check_write(key, value, key_cache, value_cache, slots)
    if not key.numel():
        return
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    blocks, heads, size, _ = key_cache.shape
    (keys, key_scales, form), (values, value_scales, _) = raw(key_cache), raw(value_cache)
    _write[(len(key),)](
        key, value, keys, values, key_scales, value_scales, slots.contiguous(), blocks * size,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), HEADS=heads, DIM=key.shape[2], SIZE=size, FORM=form,
        TILE_H=triton.next_power_of_2(heads), TILE_D=triton.next_power_of_2(key.shape[2]), enable_fp_fusion=False,
    )  # fmt: skip
