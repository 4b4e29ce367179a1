"""What a user sees while weights are read: a line now and then, on a terminal as through a launcher's pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

INTERVAL = 5.0  # seconds between two lines, and before the first


class Loading:
    """Is told how many parts of a model are loaded, and says so; a model that takes less than INTERVAL isn't worth a word."""

    def __init__(self, name: str, aloud: bool, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.aloud, self.file, self.clock = name, aloud, file, clock
        self.said = clock()

    def __call__(self, done: int, total: int) -> None:
        now = self.clock()
        if self.aloud and now - self.said >= INTERVAL:
            self.said = now
            print(f"{self.name}: {done / total:.0%} of the weights are loaded", file=self.file or sys.stderr, flush=True)
