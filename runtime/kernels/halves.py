"""A decoder layer's operations in two calls of C++, where a call from Python costs as much as its work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.build import load_extension
from runtime.kernels.packed import PackedInt4
from runtime.kernels.rows import head_dim_of

load_extension()
_attention = torch.ops.quasar.attention_half.default
_mlp = torch.ops.quasar.mlp_half.default


def _given(packed: PackedInt4) -> tuple[list[Tensor], list[int]]:
    """A weight as `csrc/halves.cpp` takes it."""
    zero = [] if packed.zero is None else [packed.zero]
    return [packed.codes, packed.scale, *zero], [packed.out_features, packed.group_size, packed.activations == "int8"]


class Halves:
    """A layer whose four products are int4. They give what the operations give one by one, bit for bit.

    norms: weight float32 [W], eps and early, of attention and of the MLP. head_norms: weights of queries and keys, eps, early.
    scoring: scale, window, soft cap, sinks. borders: of the segments of o and of down. partial: dtype of what these two give,
    None for that of the hidden state.
    """

    def __init__(
        self, norms: Sequence[tuple[Tensor, float, bool]], head_norms: tuple[Tensor | None, Tensor | None, float, bool],
        weights: Sequence[PackedInt4], qkv_bias: Tensor | None, borders: tuple[Sequence[int], Sequence[int]],
        activation: str, scoring: tuple[float, int, float, Tensor | None], partial: torch.dtype | None,
    ) -> None:  # fmt: skip
        qkv, output, gate_up, down = (_given(weight) for weight in weights)
        scale, window, cap, sinks = scoring
        self._partial = partial
        self._before: tuple[Any, ...] = (*norms[0], *qkv, qkv_bias)
        self._heads = head_norms
        self._after: tuple[Any, ...] = (scale, window, cap, None if sinks is None else sinks.float(), *output, borders[0])
        self._mlp: tuple[Any, ...] = (*norms[1], *gate_up, activation == "gelu_tanh", *down, borders[1])

    def attention(
        self, x: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
        tables: Tensor, rows: Tensor, positions: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x, update [T, W] -> this rank's part of o's output [T, W], x + update."""
        part, total = _attention(
            x, update, *self._before, cos, sin, *self._heads, keys, values, slots, head_dim_of(keys), tables, rows, positions,
            *self._after, self._partial or x.dtype,
        )  # fmt: skip
        return part, total

    def mlp(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """x, update [T, W] -> this rank's part of down's output [T, W], x + update."""
        part, total = _mlp(x, update, *self._mlp, self._partial or x.dtype)
        return part, total
