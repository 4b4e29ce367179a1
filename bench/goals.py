"""What rounds and kernels should reach on an H200, and what they have reached on the card at hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.tables import table


@dataclass(frozen=True, slots=True)
class Goal:
    """wanted: at least, or at most; form: how a value is written."""

    what: str
    wanted: float
    form: str
    at_most: bool = False

    def line(self, values: list[float]) -> list[str]:
        """The worst of what was measured, beside what is wanted."""
        sign = "<=" if self.at_most else ">="
        wanted = f"{sign} {self.form.format(self.wanted)}"
        if not values:
            return [self.what, "not measured", wanted, "-"]
        worst = max(values) if self.at_most else min(values)
        reached = worst <= self.wanted if self.at_most else worst >= self.wanted
        return [self.what, self.form.format(worst), wanted, "yes" if reached else "no"]


GOALS = {
    "bandwidth": Goal("int4 products, 8B, 1 to 16 rows, share of the copy's bandwidth", 0.8, "{:.0%}"),
    "few": Goal("the same, times as fast as bf16", 2.8, "{:.2f}x"),
    "32": Goal("int4 products, 8B, 32 rows, times as fast as bf16", 2.2, "{:.2f}x"),
    "64": Goal("int4 products, 8B, 64 rows, times as fast as bf16", 1.6, "{:.2f}x"),
    "attention": Goal("attention, 16 sequences of 6 rows over 4096, share of the copy's bandwidth", 0.7, "{:.0%}"),
    "round": Goal("a round of int4, 8B, batch 1, k 5, context 1024", 1.6, "{:.2f} ms", at_most=True),
    "batch 1": Goal("the same, times as fast as 16 bit", 2.4, "{:.2f}x"),
    "batch 16": Goal("the same, batch 16, times as fast as 16 bit", 1.6, "{:.2f}x"),
    "idle": Goal("a round's time in which the device is idle, int4, context 1024, k 5", 0.05, "{:.0%}", at_most=True),
}


@dataclass(slots=True)
class Reached:
    """Values by the goal that they belong to."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in GOALS})

    def add(self, name: str, value: float) -> None:
        self.values[name].append(value)

    def table(self) -> str:
        lines = [goal.line(self.values[name]) for name, goal in GOALS.items()]
        return table(["the worst of", "reached", "wanted on an H200", "enough"], lines)
