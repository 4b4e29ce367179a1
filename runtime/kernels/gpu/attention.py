"""Attention of new tokens over a paged cache.

A tile is a few consecutive rows of the batch times the query heads that share a key head, 16 to 32 in all, so that the
rows of a check read their sequence's keys once: as many rows as a sequence has on average. If a tile's rows belong to
several sequences, they take turns.

Keys and values of eight bits stay codes in the products: a key's scale is multiplied into its scores, a value's into its
weights.

**Order of additions.** A piece is 512 positions of a sequence, counted from its first, and is gone through 64 at a time;
a piece's result is merged into those before it, in order. Few rows: a program for each tile, key head and piece, and a
second kernel merges them. Many rows: a program goes through all pieces. A row that sees nothing of what its neighbours
see is multiplied by exactly 1 and gets exactly 0 added. So a row's bits depend neither on the rows beside it nor on how
long their sequences are. Tiles stay below 64 rows, from where on some devices take another matrix instruction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.arguments import check_attention
from runtime.kernels.gpu.cache import decode, raw
from runtime.kernels.gpu.dot import dot, narrow
from runtime.kernels.gpu.table import Table, table_of

STEP = tl.constexpr(64)  # keys
PIECE = tl.constexpr(512)


@triton.jit
def _weigh(top, now):
    """exp(top - now), and 0 where nothing was seen before."""
    return tl.where(top == float("-inf"), 0.0, tl.exp(top - now))


@triton.jit
def _merge(top, total, out, top1, total1, out1):
    """Two parts of the context in one; an empty second part changes no bit of the first."""
    now = tl.maximum(top, top1)
    fade, fade1 = tl.where(top == now, 1.0, _weigh(top, now)), tl.where(top1 == float("-inf"), 0.0, _weigh(top1, now))
    # A score that is NaN reaches the total only: maxima may pass over it.
    total = tl.fma(total, fade, total1 * fade1)
    out = tl.fma(out, fade[:, None] + tl.zeros_like(out), out1 * fade1[:, None])
    return now, total, out


@triton.jit
def _piece(
    q, mine, position, first, row, keys, values, key_scales, value_scales, tables, kv, begin, end, blocks, width, scale,
    cap, KV: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
    TILE_D: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rows `mine` of a tile see of one sequence's positions begin..end: maxima, sums of weights, weighted values."""
    d = tl.arange(0, TILE_D)
    WIDTH: tl.constexpr = DIM if FORM == "same" else DIM + 4
    # A matrix product adds up the weights: the order of a plain sum would follow from how a tile lies in its threads.
    ones = tl.full((STEP, 16), 1.0, tl.float32).to(q.dtype)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE, 16), tl.float32)
    out = tl.zeros((TILE, TILE_D), tl.float32)
    for base in range(begin, end, STEP):
        place = base + tl.arange(0, STEP)
        seen = mine[:, None] & (place[None, :] >= first[:, None]) & (place[None, :] <= position[:, None])
        block = tl.load(tables + row * width + place // SIZE, mask=(place < end) & (place // SIZE < width), other=-1)
        there = (block >= 0) & (block < blocks)
        seen &= there[None, :]
        spot = (block.to(tl.int64) * KV + kv) * SIZE + place % SIZE
        inside = there[:, None] & (d < DIM)[None, :]
        key = tl.load(keys + spot[:, None] * WIDTH + d[None, :], mask=inside, other=0)
        value = tl.load(values + spot[:, None] * WIDTH + d[None, :], mask=inside, other=0)
        if FORM != "same":
            key, value = decode(key, FORM == "fp8").to(q.dtype), decode(value, FORM == "fp8").to(q.dtype)
        score = dot(q, tl.trans(key), tl.zeros((TILE, STEP), tl.float32), PRECISION) * scale
        if FORM != "same":
            at = spot * (DIM // 4 + 1) + DIM // 4
            score *= tl.load(key_scales + at, mask=there, other=0.0)[None, :]
        if CAPPED:
            ratio = score / cap
            e = tl.exp(-2.0 * tl.abs(ratio))
            score = tl.where(ratio < 0, -cap, cap) * ((1.0 - e) / (1.0 + e))
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(top, tl.max(score, axis=1))
        fade = tl.where(top == now, 1.0, _weigh(top, now))
        weight = tl.where(seen, tl.exp(score - now[:, None]), 0.0)
        # Rows share the product with the values, and 0 times NaN is NaN: a value that isn't finite counts as 0 there and
        # makes those rows NaN that see it, no others.
        if FORM == "same":
            wide = value.to(tl.float32)
            finite = wide - wide == 0.0
            value = tl.where(finite, value, tl.zeros_like(value))
            broken = tl.max(tl.where(finite, 0.0, 1.0), axis=1)
            weighed = narrow(weight, q.dtype)
        else:
            step = tl.load(value_scales + at, mask=there, other=0.0)
            finite = step - step == 0.0
            weighed = narrow(weight * tl.where(finite, step, 0.0)[None, :], q.dtype)
            broken = tl.where(finite, 0.0, 1.0)
        hurt = tl.max(tl.where(seen, broken[None, :], 0.0), axis=1)
        total = dot(narrow(weight, q.dtype), ones, total * fade[:, None], PRECISION)
        total = tl.where(hurt[:, None] > 0, float("nan"), total)
        out = dot(weighed, value, out * fade[:, None], PRECISION)
        top = now
    return top, tl.max(total, axis=1), out  # sixteen times the same sums


@triton.jit
def _finish(top, total, out, sinks, head, inside, SINKS: tl.constexpr):
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0)
        now = tl.maximum(top, sink)
        fade = tl.where(top == now, 1.0, _weigh(top, now))
        total = tl.fma(total, fade, tl.exp(sink - now))
        out = out * fade[:, None]
    return tl.div_rn(out, total[:, None] + tl.zeros_like(out))


@triton.jit
def _attend(
    query, keys, values, key_scales, value_scales, tables, rows, positions, sinks, result, tops, totals, count, height,
    sequences, blocks, width, stride_t, stride_h, scale, cap, window, KV: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr, TILE_H: tl.constexpr, TILE_T: tl.constexpr,
    TILE_D: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = TILE_H * TILE_T
    SHARES: tl.constexpr = (GROUP + TILE_H - 1) // TILE_H  # tiles that share a key head
    kv = tl.program_id(1) // SHARES
    r, d = tl.arange(0, TILE), tl.arange(0, TILE_D)
    t = tl.program_id(0) * height + r // TILE_H
    share = tl.program_id(1) % SHARES * TILE_H + r % TILE_H
    head = kv * GROUP + share
    inside = (r // TILE_H < height) & (t < count) & (share < GROUP)
    row = tl.load(rows + t, mask=inside, other=-1)
    position = tl.load(positions + t, mask=inside, other=-1)
    live = inside & (position >= 0) & (row >= 0) & (row < sequences)
    first = tl.zeros_like(position)
    if window > 0:
        first = tl.maximum(position + 1 - window, 0)
    full = live[:, None] & (d < DIM)[None, :]
    at = t[:, None].to(tl.int64) * stride_t + head[:, None] * stride_h + d[None, :]
    q = tl.load(query + at, mask=full, other=0.0)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    out = tl.zeros((TILE, TILE_D), tl.float32)
    for i in range(height):
        turn = tl.max(tl.where(live & (r // TILE_H == i), row, -1), axis=0)
        earlier = tl.max((live & (r // TILE_H < i) & (row == turn)).to(tl.int32), axis=0)
        if (turn >= 0) & (earlier == 0):
            mine = live & (row == turn)
            low = tl.min(tl.where(mine, first, 0x7FFFFFFF), axis=0)
            high = tl.max(tl.where(mine, position, -1), axis=0) + 1
            piece, last = low // PIECE, (high + PIECE - 1) // PIECE
            if SPLIT:
                piece, last = tl.maximum(piece, tl.program_id(2)), tl.minimum(last, tl.program_id(2) + 1)
            for p in range(piece, last):
                begin = tl.maximum(p * PIECE, low // STEP * STEP)
                end = tl.minimum((p + 1) * PIECE, high)
                top1, total1, out1 = _piece(
                    q, mine, position, first, turn, keys, values, key_scales, value_scales, tables, kv, begin, end, blocks,
                    width, scale, cap, KV, SIZE, DIM, FORM, TILE, TILE_D, CAPPED, PRECISION,
                )  # fmt: skip
                top, total, out = _merge(top, total, out, top1, total1, out1)
    place = t.to(tl.int64) * (KV * GROUP) + head
    full = inside[:, None] & (d < DIM)[None, :]
    if SPLIT:
        place = place * tl.num_programs(2) + tl.program_id(2)
        tl.store(tops + place, top, mask=inside)
        tl.store(totals + place, total, mask=inside)
    else:
        out = tl.where(live[:, None], _finish(top, total, out, sinks, head, inside, SINKS), 0.0)
    tl.store(result + place[:, None] * DIM + d[None, :], narrow(out, result.dtype.element_ty), mask=full)


@triton.jit
def _join(
    tops, totals, outs, positions, rows, sinks, result, sequences, pieces, window, HEADS: tl.constexpr, TILE: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merges a row's pieces, those it sees; a program for each row and its tile of heads."""
    t = tl.program_id(0)
    head, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, TILE_D)
    inside = head < HEADS
    position, row = tl.load(positions + t), tl.load(rows + t)
    if (row < 0) | (row >= sequences):
        position = -1
    low = 0
    if window > 0:
        low = tl.maximum(position + 1 - window, 0)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    out = tl.zeros((TILE, TILE_D), tl.float32)
    full = inside[:, None] & (d < DIM)[None, :]
    at = t.to(tl.int64) * HEADS + head
    for p in range(low // PIECE, tl.minimum((position + PIECE) // PIECE, pieces)):
        top1 = tl.load(tops + at * pieces + p, mask=inside, other=float("-inf"))
        total1 = tl.load(totals + at * pieces + p, mask=inside, other=0.0)
        out1 = tl.load(outs + (at * pieces + p)[:, None] * DIM + d[None, :], mask=full, other=0.0)
        top, total, out = _merge(top, total, out, top1, total1, out1)
    if position >= 0:
        out = _finish(top, total, out, sinks, head, inside, SINKS)
    tl.store(result + at[:, None] * DIM + d[None, :], narrow(out, result.dtype.element_ty), mask=full)


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, rows: Tensor, positions: Tensor,
    scale: float, window: int = 0, soft_cap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_attention(query, key_cache, value_cache, tables, rows, positions, sinks)
    own = table_of(query.device)
    return attend(query, key_cache, value_cache, tables, rows, positions, scale, window, soft_cap, sinks, own)


def attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, rows: Tensor, positions: Tensor,
    scale: float, window: int, soft_cap: float, sinks: Tensor | None, table: Table,
) -> Tensor:  # fmt: skip
    """`paged_attention` with a table of one's own; any table gives the same bits."""
    count, heads, dim = query.shape
    blocks, kv, size, _ = key_cache.shape
    result = query.new_empty(query.shape)
    if not count:
        return result
    if query.stride(2) != 1:
        query = query.contiguous()
    tables, rows, positions = tables.contiguous(), rows.contiguous(), positions.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    group = heads // kv
    tile_h = min(16, triton.next_power_of_2(group))
    # Rows of one sequence that stand side by side, on average: known without asking the device.
    height = min(triton.cdiv(count, max(1, len(tables))), 32 // tile_h)
    tile_t = max(16 // tile_h, triton.next_power_of_2(height))
    tile_d = max(16, triton.next_power_of_2(dim))
    grid = triton.cdiv(count, height), kv * triton.cdiv(group, tile_h)
    pieces = max(1, triton.cdiv(tables.shape[1] * size, PIECE.value))
    split = pieces > 1 and grid[0] * grid[1] < table.programs
    places = (count, heads, pieces if split else 0)
    tops, totals = query.new_empty(places, dtype=torch.float32), query.new_empty(places, dtype=torch.float32)
    outs = query.new_empty((*places, dim), dtype=torch.float32) if split else result
    (keys, key_scales, form), (values, value_scales, _) = raw(key_cache), raw(value_cache)
    launch = table.attention[16 if tile_h * tile_t == 16 and form == "same" else 32]  # codes take registers
    _attend[(*grid, pieces if split else 1)](
        query, keys, values, key_scales, value_scales, tables, rows, positions, sinks, outs, tops, totals, count, height,
        len(tables), blocks, tables.shape[1], query.stride(0), query.stride(1), float(scale), float(soft_cap), window, KV=kv,
        GROUP=group, SIZE=size, DIM=dim, FORM=form, TILE_H=tile_h, TILE_T=tile_t, TILE_D=tile_d, CAPPED=soft_cap > 0,
        SINKS=sinks is not None, SPLIT=split, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        tile = min(16, triton.next_power_of_2(heads))
        _join[(count, triton.cdiv(heads, tile))](
            tops, totals, outs, positions, rows, sinks, result, len(tables), pieces, window, HEADS=heads, TILE=tile, DIM=dim,
            TILE_D=tile_d, SINKS=sinks is not None, enable_fp_fusion=False,
        )  # fmt: skip
    return result
