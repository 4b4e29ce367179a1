"""Norms, and rotary positions on the way to the cache: a program for each row, or for each head of a row.

A sum lies in a program's threads by its width alone, which fixes its order.
"""

import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.arguments import check_norm, check_rotary
from runtime.kernels.gpu.cache import put, raw
from runtime.kernels.gpu.dot import narrow


@triton.jit
def _inverse(wide, eps, WIDTH: tl.constexpr):
    """One over the root of the mean square of WIDTH numbers, which zeros follow."""
    mean = tl.div_rn(tl.sum(wide * wide, axis=0), WIDTH * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _scaled(wide, inverse, weight, EARLY: tl.constexpr, DTYPE: tl.constexpr):
    y = wide * inverse
    if EARLY:
        y = narrow(y, DTYPE).to(tl.float32)
    return narrow(y * weight, DTYPE).to(tl.float32)


@triton.jit
def _norm(
    x, residual, weight, normed, total, stride, more, eps, WIDTH: tl.constexpr, EARLY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = d < WIDTH
    wide = tl.load(x + row * stride + d, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + row * more + d, mask=inside, other=0.0).to(tl.float32)
        both = narrow(wide, DTYPE)
        tl.store(total + row * WIDTH + d, both, mask=inside)
        wide = both.to(tl.float32)
    by = tl.load(weight + d, mask=inside, other=0.0)
    y = _scaled(wide, _inverse(wide, eps, WIDTH), by, EARLY, DTYPE)
    tl.store(normed + row * WIDTH + d, y.to(DTYPE), mask=inside)


@triton.jit
def _normed(own, other, weight, d, other_d, inside, turns, eps, DIM: tl.constexpr, EARLY: tl.constexpr, DTYPE: tl.constexpr):
    """A head, and again its values at the places `other_d`, normed."""
    inverse = _inverse(own, eps, DIM)
    own = _scaled(own, inverse, tl.load(weight + d, mask=inside, other=0.0), EARLY, DTYPE)
    return own, _scaled(other, inverse, tl.load(weight + other_d, mask=turns, other=0.0), EARLY, DTYPE)


@triton.jit
def _rotate(
    qkv, cos, sin, query_norm, key_norm, query, keys, values, key_scales, value_scales, slots, spaces, stride, turn, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
    EARLY: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    HALF: tl.constexpr = TURNED // 2
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, TILE)
    inside = d < DIM
    start = qkv + token * stride + head * DIM
    own = tl.load(start + d, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + token)
    kept = (slot >= 0) & (slot < spaces)
    if head < HEADS + KV:
        other_d = tl.where(d < HALF, d + HALF, d - HALF)
        turns = d < TURNED
        other = tl.load(start + other_d, mask=turns, other=0.0).to(tl.float32)
        if query_norm is not None:  # noqa: SIM102 - known to the compiler, unlike the head
            if head < HEADS:
                own, other = _normed(own, other, query_norm, d, other_d, inside, turns, eps, DIM, EARLY, DTYPE)
        if key_norm is not None:  # noqa: SIM102
            if head >= HEADS:
                own, other = _normed(own, other, key_norm, d, other_d, inside, turns, eps, DIM, EARLY, DTYPE)
        at = token * turn + d
        a = narrow(own * tl.load(cos + at, mask=turns, other=0.0).to(tl.float32), DTYPE).to(tl.float32)
        b = narrow(other * tl.load(sin + at, mask=turns, other=0.0).to(tl.float32), DTYPE).to(tl.float32)
        own = tl.where(turns, narrow(a + tl.where(d < HALF, -b, b), DTYPE).to(tl.float32), own)
    if head < HEADS:
        tl.store(query + (token * HEADS + head) * DIM + d, own.to(DTYPE), mask=inside)
    elif kept:
        of = (head - HEADS) % KV
        spot = (slot // SIZE * KV + of) * SIZE + slot % SIZE + tl.zeros((1,), tl.int64)
        if head < HEADS + KV:
            put(own[None, :], keys, key_scales, spot, d, inside[None, :], DIM, FORM)
        else:
            put(own[None, :], values, value_scales, spot, d, inside[None, :], DIM, FORM)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, early: bool = False, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_norm(x, weight, residual)
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    rows, width = x.shape
    normed, total = x.new_empty(rows, width), x if residual is None else x.new_empty(rows, width)
    if normed.numel():
        _norm[(rows,)](
            x, residual, weight.contiguous(), normed, total, x.stride(0), 0 if residual is None else residual.stride(0),
            eps, WIDTH=width, EARLY=early, TILE=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return normed, total


def rotary_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, eps: float, early: bool,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    heads, dim = check_rotary(qkv, cos, sin, query_norm, key_norm, key_cache, value_cache, slots)
    blocks, kv, size, _ = key_cache.shape
    query = qkv.new_empty(len(qkv), heads, dim)
    (keys, key_scales, form), (values, value_scales, _) = raw(key_cache), raw(value_cache)
    if len(qkv):
        qkv, cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (qkv, cos, sin))
        if cos.stride(0) != sin.stride(0):
            cos, sin = cos.contiguous(), sin.contiguous()
        _rotate[(len(qkv), heads + 2 * kv)](
            qkv, cos, sin, query_norm, key_norm, query, keys, values, key_scales, value_scales, slots.contiguous(),
            blocks * size, qkv.stride(0), cos.stride(0), eps, HEADS=heads, KV=kv, SIZE=size, DIM=dim, TURNED=cos.shape[1],
            EARLY=early, FORM=form, TILE=triton.next_power_of_2(dim), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return query
