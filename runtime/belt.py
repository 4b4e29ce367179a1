"""Weights that stay in host memory and are brought to the device one layer ahead of their use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from runtime.kernels.reference import ALIGNMENT

NOWHERE = -1


class Belt:
    """Two buffers on the device, each as large as the largest layer, which a model's layers visit in turn.

    While one layer's products are computed from one buffer, the next layer's weights come into the other: on CUDA from
    pinned memory by a stream of their own. After the last layer comes the first, for the next pass. A layer that is used
    out of turn is fetched when it is asked for: later, and the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.fetched = 0  # layers so far
        self._device = device
        self._held: dict[int, list[Tensor]] = {}  # by layer, in host memory
        self._buffers: list[Tensor] = []
        self._after: dict[int, int] = {}
        self._layers = [NOWHERE, NOWHERE]  # whose weights are in the buffers, or on their way
        self._weights: list[list[Tensor]] = [[], []]  # the same as views of the buffers
        self._current = NOWHERE
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._there = [torch.cuda.Event(), torch.cuda.Event()] if self._stream is not None else []

    def carry(self, layer: int, weight: Tensor, kernels: ModuleType, borders: Sequence[int] = ()) -> Carried:
        """Takes over a weight [N, K] of a layer, its inputs in segments between `borders`; all before the first is used."""
        held = self._held.setdefault(layer, [])
        held.append(weight.cpu().contiguous().pin_memory() if self._stream is not None else weight.contiguous())
        return Carried(self, layer, len(held) - 1, kernels, borders)

    def start(self) -> int:
        """Makes the buffers, once all weights are here. Returns their bytes."""
        order = sorted(self._held)
        self._after = dict(zip(order, order[1:] + order[:1], strict=True))
        size = max((offsets(held)[-1] for held in self._held.values()), default=0)
        # Rounded by hand, as no allocator promises where a tensor begins.
        made = [torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self._device) for _ in self._layers]
        self._buffers = [buffer[-buffer.data_ptr() % ALIGNMENT :][:size] for buffer in made]
        return 2 * size

    def shape(self, layer: int, index: int) -> torch.Size:
        return self._held[layer][index].shape

    def weight(self, layer: int, index: int) -> Tensor:
        """A weight on the device, for products that are launched before another layer's weight is asked for."""
        if layer != self._current:
            self._enter(layer)
        return self._weights[self._layers.index(layer)][index]

    def _enter(self, layer: int) -> None:
        if layer not in self._layers:
            self._fetch(layer, 0)
        place = self._layers.index(layer)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._there[place])
        following = self._after[layer]
        if following not in self._layers:
            self._fetch(following, 1 - place)
        self._current = layer

    def _fetch(self, layer: int, place: int) -> None:
        held, buffer = self._held[layer], self._buffers[place]
        starts = offsets(held)
        self._layers[place] = layer
        self._weights[place] = [
            buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            for start, weight in zip(starts, held, strict=False)
        ]
        self.fetched += 1
        if self._stream is None:
            for there, weight in zip(self._weights[place], held, strict=True):
                there.copy_(weight)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # whoever was here is still being computed
        with torch.cuda.stream(self._stream):
            for there, weight in zip(self._weights[place], held, strict=True):
                there.copy_(weight, non_blocking=True)
            self._there[place].record(self._stream)


class Carried:
    """A dense product [N, K] whose weight a belt brings; on the device it takes no bytes of its own."""

    nbytes = 0

    def __init__(self, belt: Belt, layer: int, index: int, kernels: ModuleType, borders: Sequence[int]) -> None:
        self.out_features, self.in_features = belt.shape(layer, index)
        self._belt, self._layer, self._index = belt, layer, index
        self._product = kernels.dense_linear
        self._borders = borders

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out: Tensor = self._product(x, self._belt.weight(self._layer, self._index), self._borders, dtype)
        return out


def offsets(weights: list[Tensor]) -> list[int]:
    """Where each begins if they are laid end to end, aligned, and after them where the last one ends; in bytes."""
    return list(accumulate((-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights), initial=0))
