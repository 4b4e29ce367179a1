"""What a user sees of a running job: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.request import SpeculationStats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

INTERVAL = 10.0  # seconds between two plain lines
WINDOW = 30.0  # seconds that the speed shown is an average of


class Progress:
    """Shows counts that are handed to it; it asks nobody, so anything can be shown to it.

    Runners such as `deepspeed` put a pipe where the terminal was: there, plain lines take the place of the bar.
    """

    def __init__(
        self,
        total: int,
        resumed: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` requests, of which `resumed` were finished before this run. By default it writes to stderr."""
        if console is None:
            from rich.console import Console

            console = Console(stderr=True)
        self.total, self.done, self.tokens, self.failed = total, resumed, 0, 0
        self.acceptance: float | None = None
        self.console, self.clock = console, clock
        self.started = self.printed = clock()
        self.samples = deque([(self.started, 0)])
        self.bar = make_bar(console) if console.is_terminal else None
        self.task = self.bar.add_task("requests", total=total, completed=resumed, note="") if self.bar else None

    def update(self, *, done: int, tokens: int, failed: int = 0, stats: SpeculationStats | None = None) -> None:
        """Takes the job's counts so far, not what was added: requests with a row (resumed and failed ones too), output
        tokens of this run, rows with an error, and what speculation did."""
        self.done, self.tokens, self.failed = done, tokens, failed
        self.acceptance = stats.mean_acceptance_length if stats is not None and stats.num_drafted else None
        now = self.clock()
        if now - self.samples[-1][0] >= 1:
            self.samples.append((now, tokens))
            while len(self.samples) > 2 and self.samples[1][0] <= now - WINDOW:
                self.samples.popleft()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=self.note())
        elif now - self.printed >= INTERVAL:
            self.printed = now
            self.say(self.line())

    def note(self, speed: float | None = None) -> str:
        """The numbers beside the bar."""
        parts = [f"{self.speed() if speed is None else speed:,.1f} tokens/s"]
        if self.acceptance is not None:
            parts.append(f"acceptance length {self.acceptance:.2f}")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)

    def line(self, speed: float | None = None) -> str:
        """All of it as plain text."""
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.done:,}/{self.total:,} requests{share}, {self.note(speed)}"

    def speed(self) -> float:
        """Output tokens a second, over the last while."""
        start, tokens = self.samples[0]
        seconds = self.clock() - start
        return (self.tokens - tokens) / seconds if seconds > 0 else 0.0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the last word on the screen, with the speed of the whole run."""
        if self.bar is not None:
            self.bar.stop()
        seconds = self.clock() - self.started
        self.say(self.line(self.tokens / seconds if seconds > 0 else 0.0))


def make_bar(console: Console) -> Bar:
    """The bar of a terminal: how many requests are done, how long it takes yet, and a note."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Bar(*columns, console=console, transient=True, refresh_per_second=4)
