"""Products with weights of sixteen and eight bits, and the head's, which ends in a choice of tokens.

The weight lies as the file has it, [outputs, inputs], and is the matrix instruction's left side; see `linear.py`, whose
order of additions is this one's too: pieces of 1024 inputs, added in order. Sums of eight-bit codes are integers.

The head's tile of outputs is a tile of the vocabulary. Its logits are rounded as they would be stored, get their noise,
and leave only the best of them, so that no logits are written; `sampling.py` merges the tiles.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.arguments import check_dense, check_head, check_linear
from runtime.kernels.gpu.cache import encode
from runtime.kernels.gpu.dot import dot, narrow
from runtime.kernels.gpu.linear import add_pieces, put_tile
from runtime.kernels.gpu.sampling import NO_ID, merge_tiles, noise
from runtime.kernels.gpu.table import Table, table_of
from runtime.kernels.packed import PackedInt8

STEP = tl.constexpr(64)  # inputs at a time
PIECE = 1024


@triton.jit
def _sums(
    x, weight, n, m, here, there, inputs, stride, begin, end,
    WHOLE: tl.constexpr, PIECE: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs n of rows m over the inputs begin..end: float32 [TILE_N, TILE_M], or int32 of eight-bit codes."""
    EIGHT: tl.constexpr = weight.dtype.element_ty == tl.int8
    i = tl.arange(0, STEP)
    total = tl.zeros((TILE_N, TILE_M), tl.int32 if EIGHT else tl.float32)
    acc = tl.zeros_like(total)
    for k in range(begin, end, STEP):
        left, right = here[:, None], there[None, :]
        if not WHOLE:
            left, right = left & (k + i < inputs)[None, :], right & (k + i < inputs)[:, None]
        codes = tl.load(weight + n[:, None].to(tl.int64) * inputs + (k + i)[None, :], mask=left, other=0)
        row = tl.load(x + m[None, :].to(tl.int64) * stride + (k + i)[:, None], mask=right, other=0)
        acc = dot(codes, row, acc, PRECISION)
        if not EIGHT:
            ends = ((k + STEP) % PIECE == 0) | (k + STEP >= end)
            total += tl.where(ends, acc, 0.0)
            acc = tl.where(ends, 0.0, acc)
    return acc if EIGHT else total


@triton.jit
def _dense(
    x, weight, x_scale, scale, out, rows, outputs, inputs, stride, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    PIECE: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    here, there = n < outputs, m < rows
    begin, end = tl.program_id(2) * PIECE, inputs
    if SPLIT:
        end = tl.minimum(begin + PIECE, inputs)
    total = _sums(x, weight, n, m, here, there, inputs, stride, begin, end, WHOLE, PIECE, TILE_N, TILE_M, PRECISION)
    if x_scale is not None:
        total = total.to(tl.float32) * (tl.load(x_scale + m, mask=there)[None, :] * tl.load(scale + n, mask=here)[:, None])
    put_tile(out, total, n, m, here, there, rows, outputs, SPLIT)


@triton.jit
def _head(
    x, weight, x_scale, scale, temperatures, seeds, positions, scores, ids, rows, outputs, inputs, stride, first, tiles,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr, PIECE: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    here, there = n < outputs, m < rows
    begin = tl.program_id(2) * PIECE  # 0, and known to be aligned
    total = _sums(x, weight, n, m, here, there, inputs, stride, begin, inputs, WHOLE, PIECE, TILE_N, TILE_M, PRECISION)
    if x_scale is not None:
        total = total.to(tl.float32) * (tl.load(x_scale + m, mask=there)[None, :] * tl.load(scale + n, mask=here)[:, None])
    score = tl.where(here[:, None], narrow(total, DTYPE).to(tl.float32), float("-inf"))
    broken = tl.max((score != score).to(tl.int32), axis=0)
    temperature = tl.load(temperatures + m, mask=there, other=0.0)
    if tl.max(temperature, axis=0) > 0:
        seed = tl.load(seeds + m, mask=there, other=0)
        position = tl.load(positions + m, mask=there, other=0)
        sampled = temperature > 0
        heat = tl.where(sampled, temperature, 1.0)
        noisy = tl.div_rn(score, heat[None, :] + tl.zeros_like(score))
        noisy += noise((n + first)[:, None] + tl.zeros_like(total).to(tl.int32), position[None, :], seed[None, :])
        score = tl.where(sampled[None, :], noisy, score)
        broken = tl.maximum(broken, tl.max((score != score).to(tl.int32), axis=0))
    best = tl.max(score, axis=0)
    ident = tl.min(tl.where(here[:, None] & (score == best[None, :]), n[:, None], NO_ID), axis=0)
    at = m.to(tl.int64) * tiles + tl.program_id(1)
    tl.store(scores + at, tl.where(broken > 0, float("nan"), best), mask=there)
    tl.store(ids + at, ident, mask=there)


@triton.jit
def _round(x, codes, scales, stride, inputs, TILE: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    wide = tl.load(x + row * stride + k, mask=k < inputs, other=0.0).to(tl.float32)
    code, scale = encode(wide[None, :], False)
    at = row * inputs + k[None, :]
    tl.store(codes + at, code, mask=(k < inputs)[None, :])
    tl.store(scales + row + tl.zeros_like(scale).to(tl.int32), scale)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 [M, K], and their scales [M]; see `reference.quantize_rows`."""
    codes, scales = torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(len(x), dtype=torch.float32)
    if len(x):
        warps = 4 if x.shape[1] <= 4096 else 8
        _round[(len(x),)](
            x, codes, scales, x.stride(0), x.shape[1], TILE=triton.next_power_of_2(x.shape[1]), num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales


def dense_linear(x: Tensor, weight: Tensor, borders: Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    check_dense(x, weight, reference.ALIGNMENT)
    if borders:
        raise ValueError("this product has pieces of its own, and no segments")
    return multiply(x, weight, None, None, dtype or x.dtype, table_of(x.device))


def int8_linear(x: Tensor, packed: PackedInt8) -> Tensor:
    check_linear(x, packed)
    codes, scales = _rounded(x if x.stride(1) == 1 else x.contiguous())
    return multiply(codes, packed.codes, scales, packed.scale, x.dtype, table_of(x.device))


def multiply(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, scale: Tensor | None, dtype: torch.dtype, table: Table
) -> Tensor:
    """`dense_linear`, and `int8_linear` of rounded rows, with a table of one's own; any table gives the same bits."""
    (rows, inputs), outputs = x.shape, len(weight)
    if not rows or not outputs or not inputs:
        return x.new_zeros(rows, outputs, dtype=dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    high, tile = table.tile(table.dense, rows, 16 if x.dtype == torch.float32 else 128)
    grid = triton.cdiv(rows, high), triton.cdiv(outputs, tile.outputs)
    pieces = triton.cdiv(inputs, PIECE)
    split = scale is None and pieces > 1 and grid[0] * grid[1] < table.programs
    out = x.new_empty(rows, outputs, dtype=dtype)
    parts = x.new_empty(pieces, rows, outputs, dtype=torch.float32) if split else out
    _dense[(*grid, pieces if split else 1)](
        x, weight, x_scale, scale, parts, rows, outputs, inputs, x.stride(0), SPLIT=split, WHOLE=inputs % STEP.value == 0,
        PIECE=PIECE, TILE_N=tile.outputs, TILE_M=high, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        add_pieces[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), outputs, pieces, GATE=None, TILE=1024)
    return out


def head_best(
    x: Tensor, weight: Tensor | PackedInt8, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    check_head(x, weight, temperatures, seeds, positions, reference.ALIGNMENT)
    return choose(x, weight, temperatures, seeds, positions, first, table_of(x.device))


def choose(
    x: Tensor, weight: Tensor | PackedInt8, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int, table: Table
) -> tuple[Tensor, Tensor]:
    """`head_best` with a table of one's own; any table gives the same bits."""
    dtype, scale, x_scale = x.dtype, None, None
    if x.stride(1) != 1:
        x = x.contiguous()
    if isinstance(weight, PackedInt8):
        (x, x_scale), scale, weight = _rounded(x), weight.scale, weight.codes
    (rows, inputs), outputs = x.shape, len(weight)
    high, tile = table.tile(table.dense, rows, 16 if x.dtype == torch.float32 else 64)  # noise takes registers
    grid = triton.cdiv(rows, high), triton.cdiv(outputs, tile.outputs)
    scores = x.new_empty(rows, grid[1], dtype=torch.float32)
    ids = x.new_empty(rows, grid[1], dtype=torch.int32)
    if rows:
        _head[grid](
            x, weight, x_scale, scale, temperatures.contiguous(), seeds.contiguous(), positions.contiguous(), scores, ids,
            rows, outputs, inputs, x.stride(0), first, grid[1], WHOLE=inputs % STEP.value == 0,
            DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), PIECE=PIECE, TILE_N=tile.outputs, TILE_M=high,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return merge_tiles(scores, ids, first)
