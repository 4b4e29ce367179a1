"""Decoder layers that C++ runs without coming back to Python (`csrc/decoder.cpp`): the operations are those of `cpu`, and
they give the same bits as one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.comm import Through
from runtime.kernels.build import load_extension
from runtime.kernels.packed import PackedInt4

load_extension()
_classes = torch.classes.quasar
_run_layers = torch.ops.quasar.run_layers.default

Norm = tuple[Tensor | None, float, bool]  # weight float32 [W], eps, whether it rounds before the weight too


def product(weight: Tensor | PackedInt4, bias: Tensor | None, borders: Sequence[int]) -> Any:
    """A weight [N, K] or a packed one, as `NativeLayer` takes it; borders: between segments of its inputs."""
    if isinstance(weight, Tensor):
        return _classes.Product(weight, None, None, bias, len(weight), 0, False, list(borders))
    eight = weight.activations == "int8"
    shape = weight.out_features, weight.group_size
    return _classes.Product(weight.codes, weight.scale, weight.zero, bias, *shape, eight, list(borders))


def places(cos: Tensor, sin: Tensor, slots: Tensor, tables: Tensor, rows: Tensor, positions: Tensor) -> Any:
    """What all layers of a pass are told of its rows: cos, sin [T, R], and what `rotary_write` and `paged_attention` take."""
    return _classes.Places(cos, sin, slots, tables, rows, positions)


class NativeLayer:
    """A layer, and by itself in two calls, between which ranks add up what they have.

    norms: before attention, of queries, of keys, before the MLP. products: qkv, o, gate_up, down. scoring: scale, window, soft
    cap, sinks. partial: whether what o and down give is to be added to others', and so float32. dim: of a head.
    """

    def __init__(
        self, norms: Sequence[Norm], products: Sequence[Any], activation: str, partial: bool, dim: int,
        scoring: tuple[float, int, float, Tensor | None],
    ) -> None:  # fmt: skip
        scale, window, cap, sinks = scoring
        self.layer = _classes.Layer(
            [_classes.Norm(*norm) for norm in norms], list(products), activation == "gelu_tanh", partial, dim,
            scale, window, cap, None if sinks is None else sinks.float(),
        )  # fmt: skip

    def attention(self, x: Tensor, update: Tensor | None, keys: Tensor, values: Tensor, at: Any) -> tuple[Tensor, Tensor]:
        """x, update [T, W], a layer's cache, `places` -> this rank's part of o's output [T, W], x + update."""
        part, total = self.layer.attention(x, update, keys, values, at)
        return part, total

    def mlp(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """x, update [T, W] -> this rank's part of down's output [T, W], x + update."""
        part, total = self.layer.mlp(x, update)
        return part, total


def stack(layers: Sequence[NativeLayer], norm: Norm) -> Any:
    """Layers and the norm behind them as `run_layers` takes them. Handed over once, as Python takes a while for each."""
    return _classes.Stack([each.layer for each in layers], _classes.Norm(*norm))


def run_layers(
    stack: Any, x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], at: Any, wanted: Tensor, through: Through
) -> Tensor:
    """All layers in one call: x [T, W] -> what comes out of the last, normed, of rows `wanted` [L]. Raises PeerLost."""
    made: list[Tensor] = []

    def run(exchange: Any, timeout: float) -> tuple[int, float]:
        *made[:], state, seconds = _run_layers(stack, x, keys, values, at, wanted, exchange, timeout)
        return state, seconds

    through(run)
    return made[0]
