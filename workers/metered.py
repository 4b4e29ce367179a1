"""A communicator whose time is counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.comm import Communicator, Exchanging


class Metered:
    """Does what the communicator inside does, and books the time as "exchange"."""

    def __init__(self, inner: Communicator, clock: Clock) -> None:
        self.rank, self.size = inner.rank, inner.size
        self._inner, self._clock = inner, clock
        self.through = None if inner.through is None else self._through

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with self._clock.part("exchange"):
            return self._inner.all_reduce(x, dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        with self._clock.part("exchange"):
            return self._inner.all_gather(x)

    def _through(self, run: Exchanging) -> None:
        def booked(exchange: Any, timeout: float) -> tuple[int, float]:
            state, seconds = run(exchange, timeout)
            self._clock.book("exchange", seconds)
            return state, seconds

        assert self._inner.through is not None
        self._inner.through(booked)

    def barrier(self) -> None:
        self._inner.barrier()

    def close(self) -> None:
        self._inner.close()
