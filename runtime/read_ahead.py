"""Has the kernel read files while what came before them is still being worked on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

AHEAD = 256 << 20  # bytes
THREADS = 4  # a request may wait for its place in the device's queue


class Extent(NamedTuple):
    """The bytes start..stop of a file."""

    path: Path
    start: int
    stop: int


class ReadAhead:
    """Keeps about AHEAD bytes of what the steps of a load will read on their way into the kernel's memory.

    Nothing is copied, and nothing is waited for: a step that comes too early reads for itself, and meets the errors.
    """

    def __init__(self, steps: Sequence[Sequence[Extent]]) -> None:
        self._steps = steps
        self._next = 0  # the first step that isn't asked for
        self._bytes = 0  # of steps that are asked for and not begun
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")

    def begin(self, step: int) -> None:
        """Asks for what comes next. Steps are begun in order."""
        self._bytes -= _size(self._steps[step - 1]) if step else 0
        while self._next < len(self._steps) and (self._next <= step or self._bytes < AHEAD):
            for extent in self._steps[self._next]:
                self._pool.submit(self._ask, extent)
            self._bytes += _size(self._steps[self._next])
            self._next += 1

    def __enter__(self) -> ReadAhead:
        for path in {extent.path for step in self._steps for extent in step}:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for file in self._files.values():
            os.close(file)

    def _ask(self, extent: Extent) -> None:
        if hasattr(os, "posix_fadvise"):  # Linux has it
            os.posix_fadvise(self._files[extent.path], extent.start, extent.stop - extent.start, os.POSIX_FADV_WILLNEED)


def _size(step: Sequence[Extent]) -> int:
    return sum(extent.stop - extent.start for extent in step)
