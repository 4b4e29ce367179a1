"""The kernels for CPUs, in C++ (`csrc/`): what each does stands beside the reference's function of the same name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.arguments import (
    FLOATS,
    check_attention,
    check_best,
    check_borders,
    check_dense,
    check_gated,
    check_head,
    check_linear,
    check_norm,
    check_pack,
    check_rotary,
    check_screen,
    check_write,
)
from runtime.kernels.build import load_extension
from runtime.kernels.native import NativeLayer, places, product, run_layers, stack  # noqa: F401  whole layers in C++
from runtime.kernels.packed import PackedInt4, PackedInt8, narrow_scale
from runtime.kernels.reference_sampling import candidates, cut, masses  # noqa: F401  lists of tokens are torch's
from runtime.kernels.reference_screen import SIGMAS
from runtime.noise import SPREAD
from runtime.quantize.int4 import MIDDLE, NOT_FINITE, Int4Weight
from runtime.quantize.int8 import Int8Weight

SEGMENTS = True  # whether products can be summed in segments of their inputs
TILE4, TILE8 = 32, 16  # outputs that lie side by side in a packed weight of so many bits

load_extension()
_ops = torch.ops.quasar


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    check_write(key, value, key_cache, value_cache, slots)
    _ops.write_cache(key.contiguous(), value.contiguous(), key_cache, value_cache, slots.contiguous())


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, rows: Tensor, positions: Tensor,
    scale: float, window: int = 0, soft_cap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_attention(query, key_cache, value_cache, tables, rows, positions, sinks)
    sinks = None if sinks is None else sinks.float().contiguous()
    result: Tensor = _ops.paged_attention(
        query.contiguous(), key_cache, value_cache, tables.contiguous(), rows.contiguous(), positions.contiguous(),
        scale, window, soft_cap, sinks,
    )  # fmt: skip
    return result


def dense_linear(x: Tensor, weight: Tensor, borders: Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    check_dense(x, weight, reference.ALIGNMENT)
    check_borders(borders, x.shape[1], 1)
    result: Tensor = _ops.dense_linear(x.contiguous(), weight, borders, dtype or x.dtype)
    return result


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> Int4Weight:
    if weight.dtype not in FLOATS or weight.shape[1] % group_size:
        return reference.quantize_int4(weight, group_size, symmetric)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    codes, scale, zero, finite = _ops.quantize_int4(weight, group_size, symmetric)
    if not finite:
        raise ValueError(NOT_FINITE)
    return Int4Weight(codes, scale, zero, group_size)


def pack_int4(weight: Int4Weight, activations: str) -> PackedInt4:
    check_pack(weight, activations)
    outputs, inputs = weight.codes.shape
    symmetric = bool((weight.zero == MIDDLE).all())
    return PackedInt4(
        codes=_ops.tile_int4(weight.codes.contiguous()),
        scale=narrow_scale(_tiled(weight.scale, TILE4).transpose(1, 2).contiguous()),
        zero=None if symmetric else _tiled(weight.zero, TILE4).transpose(1, 2).contiguous(),
        out_features=outputs,
        in_features=inputs,
        group_size=weight.group_size,
        activations=activations,
    )


def int4_linear(
    x: Tensor, packed: PackedInt4, gate: str | None = None, borders: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Tensor:
    check_linear(x, packed, gate)
    check_borders(borders, packed.in_features, packed.group_size)
    result: Tensor = _ops.int4_linear(
        x.contiguous(), packed.codes, packed.scale, packed.zero, packed.out_features, packed.group_size,
        packed.activations == "int8", borders, dtype or x.dtype,
    )  # fmt: skip
    return gated(result, gate) if gate else result


def pack_int8(weight: Int8Weight) -> PackedInt8:
    outputs, inputs = weight.codes.shape
    codes = torch.nn.functional.pad(weight.codes, (0, -inputs % 4))
    tiles = _tiled((codes.short() + 128).to(torch.uint8), TILE8)
    tiles = tiles.view(len(tiles), TILE8, codes.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return PackedInt8(tiles, _tiled(weight.scale, TILE8), outputs, inputs)


def int8_linear(x: Tensor, packed: PackedInt8) -> Tensor:
    check_linear(x, packed)
    result: Tensor = _ops.int8_linear(x.contiguous(), packed.codes, packed.scale, packed.out_features)
    return result


def best_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int, cuts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_best(logits, temperatures, seeds, positions, cuts)
    if cuts is not None:
        logits = cut(logits, temperatures, cuts, first)
    scores, ids = _ops.best_tokens(
        logits.contiguous(), temperatures.contiguous(), seeds.contiguous(), positions.contiguous(), first, SPREAD
    )
    return scores, ids


def head_best(
    x: Tensor, weight: Tensor | PackedInt8, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    # Logits that are written and read again are a thousandth of the bytes of the weight: nothing to save here.
    check_head(x, weight, temperatures, seeds, positions, reference.ALIGNMENT)
    logits = int8_linear(x, weight) if isinstance(weight, PackedInt8) else dense_linear(x, weight)
    return best_tokens(logits, temperatures, seeds, positions, first)


def floors(logits: Tensor, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    check_screen(logits, x, errors)
    reach, floor = _ops.floors(logits.contiguous(), x.contiguous(), errors.contiguous(), SIGMAS)
    return reach, floor


def refine(logits: Tensor, x: Tensor, weight: Tensor, errors: Tensor, reach: Tensor, floor: Tensor) -> None:
    check_screen(logits, x, errors, weight)
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")
    _ops.refine(logits, x.contiguous(), weight.contiguous(), errors.contiguous(), reach.contiguous(), floor.contiguous())


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, early: bool = False, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_norm(x, weight, residual)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    normed, total = _ops.rms_norm(x, weight.contiguous(), eps, early, residual)
    return normed, total


def rotary_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, eps: float, early: bool,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    _, dim = check_rotary(qkv, cos, sin, query_norm, key_norm, key_cache, value_cache, slots)
    query: Tensor = _ops.rotary_write(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), query_norm, key_norm, eps, early, key_cache, value_cache,
        slots.contiguous(), dim,
    )  # fmt: skip
    return query


def gated(both: Tensor, activation: str) -> Tensor:
    check_gated(both, activation)
    result: Tensor = _ops.gated(both.contiguous(), activation == "gelu_tanh")
    return result


def _tiled(x: Tensor, tile: int) -> Tensor:
    """[N, ...] -> [tiles, tile, ...], the last one filled up with zeros."""
    more = -x.shape[0] % tile
    if more:
        x = torch.cat([x, x.new_zeros(more, *x.shape[1:])])
    return x.reshape(len(x) // tile, tile, *x.shape[1:]).contiguous()
