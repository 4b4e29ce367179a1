"""The kernels in plain torch: what the others are tested against, and what runs where they can't.

A row's result never depends on the other rows: sums fold a fixed shape by halves with elementwise additions, products
of integers are exact, and nothing else adds.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from runtime.kernels.arguments import (
    check_attention,
    check_borders,
    check_dense,
    check_head,
    check_linear,
    check_pack,
)
from runtime.kernels.folding import exp, fold, tanh, tree
from runtime.kernels.packed import PackedInt4, PackedInt8
from runtime.kernels.reference_layer import gated, rms_norm, rotary_write, write_cache
from runtime.kernels.reference_sampling import best_tokens, candidates, masses
from runtime.kernels.reference_screen import floors, refine
from runtime.kernels.rows import MOST, decode, scaled
from runtime.quantize.int4 import Int4Weight, quantize
from runtime.quantize.int8 import Int8Weight

__all__ = [
    "best_tokens", "candidates", "dense_linear", "floors", "gated", "head_best", "int4_linear", "int8_linear", "masses",
    "pack_int4", "pack_int8", "paged_attention", "quantize_int4", "refine", "rms_norm", "rotary_write", "write_cache",
]  # fmt: skip

# Rows that a dense product computes at a time, always exactly so many. Libraries choose their kernel, and with it the
# order of additions, by the number of rows (bfloat16 and float32 alike); with that number fixed a row's bits depend
# neither on its place nor on the others. A CPU takes little longer for 32 rows of 16 bit than for one, a GPU for 64.
CHUNK = {"cpu": 32, "cuda": 64}
ALIGNMENT = 64  # bytes; a library may treat the ends of an unaligned matrix otherwise
SEGMENTS = True  # whether products can be summed in segments of their inputs
PIECE = 64  # keys that are merged at a time
ELEMENTS = 1 << 24  # of the largest temporary


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, rows: Tensor, positions: Tensor,
    scale: float, window: int = 0, soft_cap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """query [T, H, D], caches [B, KV, S, D], tables [R, MB] int32, rows [T] int32, positions [T] int32 -> [T, H, D].

    Row t belongs to the sequence whose blocks are `tables[rows[t]]` and sees keys 0..positions[t] of it, or the last
    `window` of those if `window` is positive; a negative position marks a row of padding, whose result is zero. Query
    head h uses key head h // (H / KV). A score is `scale * q.k`, then `soft_cap * tanh(score / soft_cap)` if that is
    positive; `sinks` [H] float32 adds exp(sinks[h]) to a head's denominator. bfloat16, float16 or float32, all alike,
    or caches of eight bits, int8 or float8_e4m3fn [B, KV, S, D + 4]; arithmetic is float32, 64 keys at a time from the
    first on. Raises IndexError for a position or block that isn't
    there, ValueError for shapes and dtypes.
    """
    check_attention(query, key_cache, value_cache, tables, rows, positions, sinks)
    step = max(1, ELEMENTS // (query.shape[1] * query.shape[2] * PIECE))
    parts = [
        _attend(query[i : i + step].float(), key_cache, value_cache, tables, rows[i : i + step].long(),
                positions[i : i + step].long(), scale, window, soft_cap, sinks)
        for i in range(0, len(query), step)
    ]  # fmt: skip
    return torch.cat(parts).to(query.dtype) if parts else torch.empty_like(query)


def dense_linear(x: Tensor, weight: Tensor, borders: Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K], weight [N, K], both bfloat16, float16 or float32 -> [M, N] of `dtype` or else theirs, sums in float32 or wider.

    borders: between segments of the inputs, which are summed by themselves and then added as a binary tree in float32
    (`folding.tree`); rounded once, in the end. The weight is contiguous and begins at a multiple of ALIGNMENT bytes.
    Raises ValueError for shapes and dtypes.
    """
    check_dense(x, weight, ALIGNMENT)
    check_borders(borders, x.shape[1], 1)
    if borders or dtype not in (None, x.dtype):
        edges = pairwise((0, *borders, x.shape[1]))
        return tree([_dense(x[:, a:b].float(), weight[:, a:b].float().contiguous()) for a, b in edges]).to(dtype or x.dtype)
    return _dense(x, weight)


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    count, chunk = len(x), CHUNK.get(weight.device.type, 32)
    if count % chunk or not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        padded = x.new_zeros(-(-count // chunk) * chunk, x.shape[1])
        padded[:count] = x
        x = padded
    if count <= chunk:
        return torch.nn.functional.linear(x, weight)[:count]
    return torch.cat([torch.nn.functional.linear(rows, weight) for rows in x.split(chunk)])[:count]


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> Int4Weight:
    """Rounds a weight [N, K] to the nearest codes: `runtime.quantize.int4.quantize`, whose bits every module gives."""
    return quantize(weight, group_size, symmetric)


def pack_int4(weight: Int4Weight, activations: str) -> PackedInt4:
    """Lays a weight out for `int4_linear`. activations: "int8" or "16bit". Raises ValueError."""
    check_pack(weight, activations)
    outputs, inputs = weight.codes.shape
    return PackedInt4(weight.codes, weight.scale, weight.zero, outputs, inputs, weight.group_size, activations)


def int4_linear(
    x: Tensor, packed: PackedInt4, gate: str | None = None, borders: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Tensor:
    """x [M, K] bfloat16, float16 or float32 -> [M, N] of `dtype` or else of its own; with a gate, `gated` of that, [M, N / 2].

    With "int8" activations each row's groups are rounded to -127..127 (`quantize_rows`), and the result is, in float32,
    added group after group from zero with each operation rounded by itself,

        sum over g of  (acc[g] - zero[g] * sum[g]) * (x_scale[g] * scale[g])

    with acc the exact sum of codes times codes and sum that of the activations' codes alone. Every implementation gives
    these bits. With "16bit" the products of (code - zero) and x are added in float32, group by group and in an order
    of the implementation's own. Between `borders`, which are whole groups, segments are summed like this by themselves and
    then added as a binary tree (`folding.tree`). Raises ValueError for shapes and dtypes.
    """
    check_linear(x, packed, gate)
    check_borders(borders, packed.in_features, packed.group_size)
    size, wide = packed.group_size, x.float()
    rounded = quantize_rows(wide, size) if packed.activations == "int8" else None
    edges = [edge // size for edge in (0, *borders, packed.in_features)]
    out = tree([_int4_segment(wide, rounded, packed, range(*both)) for both in pairwise(edges)]).to(dtype or x.dtype)
    return gated(out, gate) if gate else out


def _int4_segment(
    wide: Tensor, rounded: tuple[Tensor, Tensor, Tensor] | None, packed: PackedInt4, groups: range
) -> Tensor:
    assert packed.zero is not None
    size, x = packed.group_size, wide
    out = wide.new_zeros(len(x), packed.out_features)
    for g in groups:
        inputs = slice(g * size, (g + 1) * size)
        codes = packed.codes[:, inputs].float()
        zero, scale = packed.zero[:, g].float(), packed.scale[:, g]
        if rounded is not None:
            code, x_scale, total = rounded
            exact = code[:, inputs].float() @ codes.t() - zero * total[:, g, None].float()  # integers below 2^24
            out = out + exact * (x_scale[:, g, None] * scale)
        else:
            codes = codes - zero[:, None]
            step = max(1, ELEMENTS // max(1, codes.numel()))
            parts = [fold(wide[i : i + step, None, inputs] * codes) for i in range(0, len(x), step)]
            out = out + torch.cat([*parts, out[:0]]) * scale
    return out


def pack_int8(weight: Int8Weight) -> PackedInt8:
    """Lays a weight out for `int8_linear`."""
    return PackedInt8(weight.codes, weight.scale, *weight.codes.shape)


def int8_linear(x: Tensor, packed: PackedInt8) -> Tensor:
    """x [M, K] bfloat16, float16 or float32 -> [M, N] of its dtype.

    Each row is rounded to -127..127 as a whole; the result is float(acc) * (x_scale * scale) in float32, with acc the
    exact sum of codes times codes. Every implementation gives these bits. Raises ValueError for shapes and dtypes.
    """
    check_linear(x, packed)
    code, x_scale, _ = quantize_rows(x.float(), packed.in_features)
    exact = code.double() @ packed.codes.double().t()  # exact in any order, as it is below 2^53
    return (exact.float() * (x_scale * packed.scale)).to(x.dtype)


def quantize_rows(x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] float32 -> codes int8 [M, K], scales float32 [M, K / size], sums of a group's codes int32 [M, K / size].

    code = round_half_even(x * (127 / amax)), scale = amax / 127, amax the group's largest magnitude. Below 2^-100 a
    group counts as zero; where it isn't finite its codes are zero and its scale is NaN: the whole row becomes NaN.
    """
    y, scale = scaled(x.view(len(x), x.shape[1] // size, size), 127.0)
    code = torch.round(y)
    return code.to(torch.int8).view(x.shape), scale, code.sum(-1).int()


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, rows: Tensor, positions: Tensor,
    scale: float, window: int, soft_cap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    count, heads, dim = query.shape
    blocks, kv_heads, size, _ = key_cache.shape
    live = positions >= 0
    if not live.any():
        return torch.zeros_like(query)
    if int(positions.max()) >= tables.shape[1] * size:
        raise IndexError(f"position {int(positions.max())} lies behind {tables.shape[1]} blocks of {size}")
    if int(rows[live].min()) < 0 or int(rows[live].max()) >= len(tables):
        raise IndexError(f"rows must be in 0..{len(tables) - 1}")
    rows = rows.clamp(0, len(tables) - 1)
    query = query.view(count, kv_heads, heads // kv_heads, 1, dim)
    first = (positions + 1 - window).clamp(min=0) if window > 0 else torch.zeros_like(positions)
    top = query.new_full((count, kv_heads, heads // kv_heads), float("-inf"))
    total = torch.zeros_like(top)
    out = query.new_zeros((*top.shape, dim))
    for base in range(int(first[live].min()) // PIECE * PIECE, int(positions.max()) + 1, PIECE):
        places = torch.arange(base, base + PIECE, device=query.device)
        seen = (places >= first[:, None]) & (places <= positions[:, None])  # [T, 64]
        block = tables[rows[:, None], (places // size).clamp(max=tables.shape[1] - 1)].long().where(seen, 0)
        if int(block.min()) < 0 or int(block.max()) >= blocks:
            raise IndexError(f"a table names a block that is none of {blocks}")
        keys = _rows(key_cache, block, places % size).transpose(1, 2)[:, :, None]  # [T, KV, 1, 64, D]
        values = _rows(value_cache, block, places % size).transpose(1, 2)[:, :, None]
        there = seen[:, None, None]  # a row that sees no key here keeps what it has
        score = fold(query * keys) * scale
        if soft_cap > 0:
            score = soft_cap * tanh(score / soft_cap)
        score = score.where(there, float("-inf"))
        now = torch.maximum(top, score.amax(-1))
        fade = exp(top - now).where(now > float("-inf"), 1.0)
        weight = exp(score - now[..., None]).where(there, 0.0)
        total = total * fade + fold(weight)
        # Values of places that aren't seen may be anything, NaN included.
        blend = fold((weight[..., None] * values.where(there[..., None], 0.0)).transpose(-1, -2))
        out = out * fade[..., None] + blend
        top = now
    if sinks is not None:
        sink = sinks.float().view(1, kv_heads, -1)
        now = torch.maximum(top, sink)
        fade = exp(top - now)
        out = out * fade[..., None]
        total = total * fade + exp(sink - now)
    out = (out / total[..., None]).where(live[:, None, None, None], 0.0)
    return out.view(count, heads, dim)


def _rows(cache: Tensor, blocks: Tensor, places: Tensor) -> Tensor:
    if cache.dtype in MOST:
        return decode(cache.view(torch.int8)[blocks, :, places].view(cache.dtype))
    return cache[blocks, :, places].float()


def head_best(
    x: Tensor, weight: Tensor | PackedInt8, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """`best_tokens` of x [M, K] times the head's weight [V, K], of x's dtype or from `pack_int8`, to the same bits.

    Nobody sees the logits, which a kernel therefore need not write. Raises ValueError for shapes and dtypes.
    """
    check_head(x, weight, temperatures, seeds, positions, ALIGNMENT)
    logits = int8_linear(x, weight) if isinstance(weight, PackedInt8) else dense_linear(x, weight)
    return best_tokens(logits, temperatures, seeds, positions, first)
