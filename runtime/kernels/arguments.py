"""What every implementation asks of its arguments, checked in one place."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from runtime.kernels.packed import ACTIVATIONS, PackedInt4, PackedInt8
from runtime.kernels.rows import MOST, head_dim_of
from runtime.quantize.int4 import Int4Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
GATES = ("silu", "gelu_tanh")


def _need(condition: bool, what: str, *values: object) -> None:
    # Kernels are called hundreds of times a round: the message is made only when it is needed.
    if not condition:
        raise ValueError(what.format(*(tuple(x) if isinstance(x, torch.Size) else x for x in values)))


def _caches(dtype: torch.dtype, dim: int, key_cache: Tensor, value_cache: Tensor) -> None:
    """Caches hold the dtype of what is written and read, or eight bits; see `runtime/kernels/rows.py`."""
    _need(key_cache.shape == value_cache.shape, "the caches differ in shape")
    _need(key_cache.dtype == value_cache.dtype, "the caches differ in dtype")
    eight = key_cache.dtype in MOST
    _need(eight or key_cache.dtype == dtype, "tokens and caches differ in dtype")
    _need(head_dim_of(key_cache) == dim, "a cache of {} has no rows of {}", key_cache.shape, dim)
    _need(not eight or dim % 4 == 0, "rows of {} numbers: an eight-bit cache takes multiples of 4", dim)
    _need(key_cache.is_contiguous() and value_cache.is_contiguous(), "caches must be contiguous")


def check_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Raises ValueError unless the arguments of `write_cache` fit each other."""
    _need(key.dim() == 3 and key_cache.dim() == 4, "tokens are [T, KV, D], caches [B, KV, S, D]")
    tokens, heads, dim = key.shape
    _need(value.shape == key.shape, "keys are {}, values {}", key.shape, value.shape)
    _need(key_cache.shape[1] == heads, "heads of {} don't fit", key_cache.shape)
    _need(key.dtype == value.dtype, "keys and values differ in dtype")
    _caches(key.dtype, dim, key_cache, value_cache)
    _need(slots.shape == (tokens,) and slots.dtype == torch.int64, "slots must be int64 [{}]", tokens)


def check_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, rows: Tensor, positions: Tensor,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError unless the arguments of `paged_attention` fit each other."""
    _need(query.dim() == 3 and key_cache.dim() == 4, "queries are [T, H, D], caches [B, KV, S, D]")
    tokens, heads, dim = query.shape
    kv_heads = key_cache.shape[1]
    _need(heads % kv_heads == 0, "{} query heads don't share {} key heads evenly", heads, kv_heads)
    _need(query.dtype in FLOATS, "attention takes bfloat16, float16 or float32, not {}", query.dtype)
    _caches(query.dtype, dim, key_cache, value_cache)
    _need(tables.dim() == 2 and tables.dtype == torch.int32, "tables must be int32 [R, MB]")
    _need(rows.shape == (tokens,) and rows.dtype == torch.int32, "rows must be int32 [{}]", tokens)
    _need(positions.shape == (tokens,) and positions.dtype == torch.int32, "positions must be int32 [{}]", tokens)
    _need(sinks is None or sinks.shape == (heads,), "sinks must be [{}]", heads)


def check_pack(weight: Int4Weight, activations: str) -> None:
    """Raises ValueError unless `pack_int4` can take this weight."""
    _need(activations in ACTIVATIONS, "activations are one of {}, not {!r}", ", ".join(ACTIVATIONS), activations)
    size = weight.group_size
    _need(size % 8 == 0 and size <= 4096, "groups of {} inputs: a multiple of 8 up to 4096 is needed", size)


def check_borders(borders: Sequence[int], inputs: int, unit: int) -> None:
    """Raises ValueError unless these are the inner borders of at most eight segments of the inputs, in whole units."""
    inside = all(0 < a < b for a, b in pairwise((*borders, inputs))) and all(border % unit == 0 for border in borders)
    _need(inside and len(borders) < 8, "{} don't part {} inputs into segments of whole {}", borders, inputs, unit)


def check_linear(x: Tensor, packed: PackedInt4 | PackedInt8, gate: str | None = None) -> None:
    """Raises ValueError unless x [M, K] fits the packed weight, whose outputs are gates and ups if there is a gate."""
    _need(gate is None or gate in GATES, "activations are {}, not {!r}", ", ".join(GATES), gate)
    _need(gate is None or packed.out_features % 2 == 0, "{} outputs aren't gates and ups", packed.out_features)
    _need(x.dim() == 2 and x.shape[1] == packed.in_features, "x is {}, not [M, {}]", x.shape, packed.in_features)
    _need(x.dtype in FLOATS, "products take bfloat16, float16 or float32, not {}", x.dtype)


def check_dense(x: Tensor, weight: Tensor, alignment: int) -> None:
    """Raises ValueError unless x [M, K] fits the weight [N, K], which lies as libraries like it."""
    _need(x.dim() == 2 and weight.dim() == 2, "x is [M, K], a weight [N, K]")
    _need(x.shape[1] == weight.shape[1], "x is {}, not [M, {}]", x.shape, weight.shape[1])
    _need(x.dtype == weight.dtype and x.dtype in FLOATS, "x is {}, the weight {}", x.dtype, weight.dtype)
    _need(weight.is_contiguous() and weight.data_ptr() % alignment == 0, "a weight is contiguous and aligned")


def check_best(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, cuts: Tensor | None = None
) -> None:  # fmt: skip
    """Raises ValueError unless the arguments of `best_tokens` fit each other."""
    _need(logits.dim() == 2 and logits.shape[1] > 0, "logits are [R, V] with V of 1 or more")
    _need(logits.dtype in FLOATS, "logits are bfloat16, float16 or float32, not {}", logits.dtype)
    shape = (len(logits),)
    _need(temperatures.shape == shape and temperatures.dtype == torch.float32, "temperatures must be float32 {}", shape)
    _need(seeds.shape == shape and seeds.dtype == torch.int64, "seeds must be int64 {}", shape)
    _need(positions.shape == shape and positions.dtype == torch.int64, "positions must be int64 {}", shape)
    _need(cuts is None or (cuts.shape == shape and cuts.dtype == torch.int64), "cuts must be int64 {}", shape)


def check_candidates(logits: Tensor, temperatures: Tensor, count: int = 1) -> None:
    """Raises ValueError unless the arguments of `candidates` or `masses` fit each other."""
    _need(logits.dim() == 2 and logits.shape[1] > 0, "logits are [R, V] with V of 1 or more")
    _need(logits.dtype in FLOATS, "logits are bfloat16, float16 or float32, not {}", logits.dtype)
    shape = (len(logits),)
    _need(temperatures.shape == shape and temperatures.dtype == torch.float32, "temperatures must be float32 {}", shape)
    _need(count > 0, "there is at least one candidate, not {}", count)


def check_head(
    x: Tensor, weight: Tensor | PackedInt8, temperatures: Tensor, seeds: Tensor, positions: Tensor, alignment: int
) -> None:  # fmt: skip
    """Raises ValueError unless the arguments of `head_best` fit each other."""
    if isinstance(weight, PackedInt8):
        check_linear(x, weight)
    else:
        check_dense(x, weight, alignment)
    outputs = weight.out_features if isinstance(weight, PackedInt8) else len(weight)
    check_best(x.new_empty(()).expand(len(x), outputs), temperatures, seeds, positions)


def check_screen(logits: Tensor, x: Tensor, errors: Tensor, weight: Tensor | None = None) -> None:
    """Raises ValueError unless the arguments of `floors`, or with a weight of `refine`, fit each other."""
    _need(logits.dim() == 2 and x.dim() == 2 and len(logits) == len(x), "logits {} aren't of x {}", logits.shape, x.shape)
    _need(x.dtype in FLOATS and logits.dtype == x.dtype, "logits and x are bfloat16, float16 or float32, and alike")
    outputs = logits.shape[1]
    _need(errors.shape == (outputs,) and errors.dtype == torch.float32, "errors must be float32 [{}]", outputs)
    fits = weight is None or (weight.shape == (outputs, x.shape[1]) and weight.dtype == x.dtype)
    _need(fits, "the weight doesn't fit logits {} of x {}", logits.shape, x.shape)


def check_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raises ValueError unless the arguments of `rms_norm` fit each other."""
    _need(x.dim() == 2 and x.dtype in FLOATS, "x is [M, W] of bfloat16, float16 or float32")
    _need(weight.shape == x.shape[1:] and weight.dtype == torch.float32, "weight must be float32 [{}]", x.shape[1])
    _need(residual is None or (residual.shape == x.shape and residual.dtype == x.dtype), "the residual isn't like x")


def check_rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor,
) -> tuple[int, int]:  # fmt: skip
    """The number of query heads and their width. Raises ValueError unless the arguments of `rotary_write` fit each other."""
    _need(qkv.dim() == 2 and key_cache.dim() == 4, "the projection is [T, (H + 2 KV) * D], caches [B, KV, S, D]")
    tokens, kv_heads, dim = len(qkv), key_cache.shape[1], head_dim_of(key_cache)
    heads = qkv.shape[1] // dim - 2 * kv_heads
    _need(heads > 0 and qkv.shape[1] % dim == 0, "{} outputs are no heads of {} over {} of keys", qkv.shape[1], dim, kv_heads)
    _need(qkv.dtype in FLOATS, "the projection is bfloat16, float16 or float32, not {}", qkv.dtype)
    _need(qkv.dtype == cos.dtype == sin.dtype, "projection and angles differ in dtype")
    _caches(qkv.dtype, dim, key_cache, value_cache)
    _need(cos.shape == sin.shape and cos.dim() == 2 and len(cos) == tokens, "cos and sin are [{}, R]", tokens)
    _need(cos.shape[1] % 2 == 0 and cos.shape[1] <= dim, "{} dimensions of {} cannot turn", cos.shape[1], dim)
    for norm in (query_norm, key_norm):
        _need(norm is None or (norm.shape == (dim,) and norm.dtype == torch.float32), "norms are float32 [{}]", dim)
    _need(slots.shape == (tokens,) and slots.dtype == torch.int64, "slots must be int64 [{}]", tokens)
    return heads, dim


def check_gated(both: Tensor, activation: str) -> None:
    """Raises ValueError unless the arguments of `gated` are what it knows."""
    _need(both.dim() == 2 and both.shape[1] % 2 == 0 and both.dtype in FLOATS, "gates and ups are float [M, 2 I]")
    _need(activation in GATES, "activations are {}, not {!r}", ", ".join(GATES), activation)
