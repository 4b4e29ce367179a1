"""A communicator whose time is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.comm import Communicator


class Metered:
    """Does what the communicator inside does, and books the time as "exchange"."""

    def __init__(self, inner: Communicator, clock: Clock) -> None:
        self.rank, self.size = inner.rank, inner.size
        self._inner, self._clock = inner, clock

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with self._clock.part("exchange"):
            return self._inner.all_reduce(x, dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        with self._clock.part("exchange"):
            return self._inner.all_gather(x)

    def barrier(self) -> None:
        self._inner.barrier()

    def close(self) -> None:
        self._inner.close()
