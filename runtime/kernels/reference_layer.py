"""What a decoder layer does between its products and beside attention, in plain torch; part of `reference.py`.

Arithmetic is float32. Values are rounded to the tensors' dtype where a chain of torch operations would store them, so
that 16-bit results stay next to those of such a chain.
"""

import torch
from torch import Tensor

from runtime.kernels.arguments import check_gated, check_norm, check_rotary, check_write
from runtime.kernels.folding import exp, fold
from runtime.kernels.rows import MOST, encode


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Puts the keys and values [T, KV, D] of T tokens into the caches [B, KV, S, D] at `slots` [T] int64.

    slot = block * S + offset; a token whose slot is negative is skipped; two tokens never share a slot. Caches are
    contiguous and have the tokens' dtype, or eight bits (int8 or float8_e4m3fn, [B, KV, S, D + 4]): then each row is
    rounded, with a scale of its own behind it (`runtime/kernels/rows.py`). Raises IndexError for a slot behind the cache,
    ValueError for shapes and dtypes.
    """
    check_write(key, value, key_cache, value_cache, slots)
    _put(key, key_cache, slots)
    _put(value, value_cache, slots)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, early: bool = False, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, residual [M, W] of one dtype, weight float32 [W] -> (normed, total), both [M, W] of that dtype.

    total is x + residual, rounded (x itself without a residual); normed is total / sqrt(mean(total^2) + eps) * weight.
    `early` rounds before the weight as well as after it. Raises ValueError for shapes and dtypes.
    """
    check_norm(x, weight, residual)
    total = x if residual is None else x + residual
    return _normalize(total, weight, eps, early), total


def rotary_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, eps: float, early: bool,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """A merged projection [T, (H + 2 KV) * D] becomes queries [T, H, D], and keys and values in the caches.

    Queries come first, then keys, then values. Heads of queries and keys are normed where there is a weight (float32
    [D], as in `rms_norm`), then their first R dimensions turn: of the pair (d, d + R / 2) the first becomes
    a * cos[d] - b * sin[d], the second b * cos[d + R / 2] + a * sin[d + R / 2], each product and sum rounded. cos, sin
    [T, R], R even and at most D. Caches [B, KV, S, D], slots [T] int64 and their errors are those of `write_cache`.
    Raises ValueError for shapes and dtypes, IndexError for a slot behind the cache.
    """
    heads, dim = check_rotary(qkv, cos, sin, query_norm, key_norm, key_cache, value_cache, slots)
    kv_heads = key_cache.shape[1]
    query, key, value = qkv.view(len(qkv), -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None:
        query = _normalize(query, query_norm, eps, early)
    if key_norm is not None:
        key = _normalize(key, key_norm, eps, early)
    _put(_rotate(key, cos, sin), key_cache, slots)
    _put(value, value_cache, slots)
    return _rotate(query, cos, sin)


def gated(both: Tensor, activation: str) -> Tensor:
    """both [M, 2 I], the gates before the ups -> activation(gate) * up [M, I], the activation rounded first.

    activation: "silu", or "gelu_tanh" (GELU by its tanh formula). Raises ValueError.
    """
    check_gated(both, activation)
    gate, up = both.chunk(2, dim=-1)
    wide = gate.float()
    # GELU: x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), which doesn't cancel where tanh is near -1.
    inner = wide if activation == "silu" else 1.5957691216 * (wide + 0.044715 * wide * wide * wide)
    e = exp(-inner.abs())
    y = wide * (torch.where(inner < 0, e, 1.0) / (1.0 + e))
    return y.to(both.dtype) * up


def _put(tokens: Tensor, cache: Tensor, slots: Tensor) -> None:
    size = cache.shape[2]
    if len(slots) and int(slots.max()) >= cache.shape[0] * size:
        raise IndexError(f"slot {int(slots.max())} is behind the cache's {cache.shape[0] * size}")
    tokens, slots = tokens[slots >= 0], slots[slots >= 0]
    if cache.dtype in MOST:
        tokens, cache = encode(tokens.float(), cache.dtype).view(torch.int8), cache.view(torch.int8)
    cache[slots // size, :, slots % size] = tokens


def _normalize(x: Tensor, weight: Tensor, eps: float, early: bool) -> Tensor:
    wide = x.float()
    mean = fold(wide * wide) / torch.full((), float(x.shape[-1]), device=x.device)
    y = wide * (1.0 / torch.sqrt(mean + eps))[..., None]
    if early:
        y = y.to(x.dtype).float()
    return (y * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[1]
    first, second, rest = x.split([turned // 2, turned // 2, x.shape[-1] - turned], dim=-1)
    whole = torch.cat([first, second], dim=-1) * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([whole, rest], dim=-1)
