"""The best token of every row: a program for each row and tile of the vocabulary, and one a row that merges the tiles.

Lists of candidates are made alike: a program sorts its tile's tokens by key and keeps as many as are asked for. Logits are
written for them and read again: at 64 rows of bfloat16 and 4096 inputs that is 3 % of what the head's product reads, and
the lists of tiles as narrow as a product's, 64 keys of 8 bytes for every 64 tokens, would be four times as much.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.arguments import check_best, check_candidates
from runtime.kernels.folding import fold
from runtime.order import best_keys
from runtime.softmax import exp

TILE = 1024  # tokens of a program
NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _word(token, position, key0, key1):
    """The first word of Philox-4x32-10 of `runtime/noise.py`; all arguments are uint32."""
    c0, c1 = token, position
    c2 = tl.zeros_like(token)
    c3 = c2
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32)), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32)), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0


@triton.jit
def _log(x):
    """Natural logarithm of positive normal float32, to some two units in the last place, near 1 as well.

    The device's fast logarithm errs by 2^-22 whatever the size of its result, and the best tokens' noise comes from
    numbers next to 1. Here x = m * 2^e with m around 1, and log m = 2 atanh(s) with s = (m - 1) / (m + 1), by its series.
    """
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # of sqrt(1/2): m lies between it and its double
    e = (bits >> 23).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = m - 1.0
    s = tl.div_rn(f, m + 1.0)
    z = s * s
    series = tl.fma(tl.fma(tl.fma(z, 0.22222222, 0.2857143), z, 0.4), z, 0.6666667)
    # f - s * f is 2s, and f is exact: the sum keeps f's bits.
    rest = tl.fma(z * s, series, s * -f)
    return tl.fma(e, 0.693359375, f + tl.fma(e, -2.12194440e-4, rest))


@triton.jit
def noise(token, position, seed):
    """Gumbel noise of `runtime/noise.py`, float32: int32 token ids, int64 positions and seeds that broadcast to them."""
    none = tl.zeros_like(token).to(tl.uint32)
    low, high = seed.to(tl.uint32) + none, (seed >> 32).to(tl.uint32) + none
    word = _word(token.to(tl.uint32), position.to(tl.uint32) + none, low, high)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-7
    return -_log(-_log(uniform))


@triton.jit
def _key(value, token):
    """The key of `runtime/order.py`: of float32 values, none of them NaN, and int32 token ids."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _scaled(logits, temperatures, row, token, inside):
    value = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    return tl.div_rn(value, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(value))


@triton.jit
def _lists(
    logits, temperatures, keys, stride, first, VOCAB: tl.constexpr, TILE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, TILE)
    token = tile * TILE + i
    value = _scaled(logits + row * stride, temperatures, row, token, token < VOCAB)
    value = tl.where(value == value, value, float("-inf"))
    key = tl.where(token < VOCAB, _key(value, token + first), -0x8000000000000000)
    place = row * tl.num_programs(1) + tile
    tl.store(keys + place * KEPT + i, tl.sort(key, descending=True), mask=i < KEPT)


@triton.jit
def _sums(logits, temperatures, tops, sums, stride, VOCAB: tl.constexpr, TILE: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    value = _scaled(logits + row * stride, temperatures, row, token, token < VOCAB)
    value = tl.where(value == value, value, float("-inf"))
    top = tl.max(value, axis=0)
    finite = (top > float("-inf")) & (top < float("inf"))
    # Where the largest is infinite all are made zero, so that no infinity is taken from another.
    away = tl.where(finite, value, 0.0).to(tl.float64) - tl.where(finite, top, 0.0).to(tl.float64)
    place = row * tl.num_programs(1) + tile
    tl.store(tops + place, top)
    tl.store(sums + place, tl.where(finite, tl.sum(tl.exp(away), axis=0), 0.0))


@triton.jit
def _tiles(
    logits, temperatures, seeds, positions, cuts, scores, ids, stride, first, VOCAB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < VOCAB
    score = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    broken = tl.max((score != score).to(tl.int32), axis=0)
    value = tl.div_rn(score, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(score))
    if cuts is not None:
        some = tl.where(value == value, value, float("-inf"))
        left = _key(some, token + first) >= tl.load(cuts + row)
        score, value = tl.where(left, score, float("-inf")), tl.where(left, value, float("-inf"))
    if temperature > 0:
        score = value
        score += noise(token + first, tl.load(positions + row), tl.load(seeds + row))
        broken = tl.maximum(broken, tl.max((score != score).to(tl.int32), axis=0))
    best = tl.max(score, axis=0)
    ident = tl.min(tl.where(inside & (score == best), token, NO_ID), axis=0)
    place = row * tl.num_programs(1) + tile
    tl.store(scores + place, tl.where(broken > 0, float("nan"), best))
    tl.store(ids + place, ident)


@triton.jit
def _merge(scores, ids, best_scores, best_ids, first, tiles, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    best = tl.full((WIDTH,), float("-inf"), tl.float32)
    ident = tl.full((WIDTH,), NO_ID, tl.int32)
    broken = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, tiles, WIDTH):
        inside = start + i < tiles
        score = tl.load(scores + row * tiles + start + i, mask=inside, other=float("-inf"))
        token = tl.load(ids + row * tiles + start + i, mask=inside, other=NO_ID)
        broken |= (score != score).to(tl.int32)
        better = (score > best) | ((score == best) & (token < ident))
        best, ident = tl.where(better, score, best), tl.where(better, token, ident)
    top = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == top, ident, NO_ID), axis=0)
    failed = tl.max(broken, axis=0) > 0
    tl.store(best_scores + row, tl.where(failed, float("nan"), top))
    tl.store(best_ids + row, tl.where(failed, 0, winner).to(tl.int64) + first)


def in_tiles(logits: Tensor, tile: int) -> tuple[Tensor, int, int]:
    """Logits with a row's tokens side by side, how many rows there are, and how many tiles of so many tokens each has."""
    rows, vocab = logits.shape
    return logits if logits.stride(1) == 1 else logits.contiguous(), rows, triton.cdiv(vocab, tile)


def best_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int, cuts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_best(logits, temperatures, seeds, positions, cuts)
    logits, rows, tiles = in_tiles(logits, TILE)
    scores, ids = logits.new_empty(rows, tiles, dtype=torch.float32), logits.new_empty(rows, tiles, dtype=torch.int32)
    if rows:
        _tiles[(rows, tiles)](
            logits, temperatures.contiguous(), seeds.contiguous(), positions.contiguous(), cuts, scores, ids,
            logits.stride(0), first, VOCAB=logits.shape[1], TILE=TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return merge_tiles(scores, ids, first)


def merge_tiles(scores: Tensor, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The best of each row's tiles [R, tiles]; ids count from the slice's first token."""
    rows, tiles = scores.shape
    best_scores, best_ids = scores.new_empty(rows), ids.new_empty(rows, dtype=torch.int64)
    if rows:
        _merge[(rows,)](scores, ids, best_scores, best_ids, first, tiles, WIDTH=256)
    return best_scores, best_ids


def candidates(logits: Tensor, temperatures: Tensor, count: int, first: int) -> Tensor:
    check_candidates(logits, temperatures, count)
    return listed(logits, temperatures, count, first, TILE)


def listed(logits: Tensor, temperatures: Tensor, count: int, first: int, tile: int) -> Tensor:
    """`candidates` from lists of `tile` tokens, a power of two."""
    logits, rows, tiles = in_tiles(logits, tile)
    kept = min(count, tile)
    keys = logits.new_empty(rows, tiles * kept, dtype=torch.int64)
    if rows:
        _lists[(rows, tiles)](
            logits, temperatures.contiguous(), keys, logits.stride(0), first, VOCAB=logits.shape[1], TILE=tile, KEPT=kept,
            enable_fp_fusion=False,
        )  # fmt: skip
    return best_keys(keys, count)


def masses(logits: Tensor, temperatures: Tensor) -> Tensor:
    check_candidates(logits, temperatures)
    logits, rows, tiles = in_tiles(logits, TILE)
    tops, sums = logits.new_empty(rows, tiles, dtype=torch.float32), logits.new_empty(rows, tiles, dtype=torch.float64)
    if rows:
        _sums[(rows, tiles)](
            logits, temperatures.contiguous(), tops, sums, logits.stride(0), VOCAB=logits.shape[1], TILE=TILE,
            enable_fp_fusion=False,
        )  # fmt: skip
    top = tops.amax(1, keepdim=True).double()
    finite = top.isfinite()
    away = (tops.double() - top).where(finite, 0.0)
    return fold(sums * exp(away)).where(finite[:, 0], 0.0)
