"""What rounds cost a group: measured before the first one, corrected by every one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WEIGHT = 0.1  # of one round, at the least, in what its number of rows is believed to cost
TRIED = 4.0  # rounds that a trial counts for
DRIFT = 0.05  # of one round without drafts in what all rounds are believed to cost
FORGOTTEN = 1 / 1024  # of what is believed of other numbers of rows, with every round


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that rounds took when they were tried out, drafting left out.

    rows: tokens of a round, rising. contexts: tokens before each of them, rising. seconds: one for each of the rows at the
    first context, then at the next. step, row: of the model that drafts, if there is one: for one more draft of all
    sequences, and for every sequence in it.
    """

    rows: list[int]
    contexts: list[int]
    seconds: list[float]
    step: float = 0.0
    row: float = 0.0


@dataclass(frozen=True, slots=True)
class Effort:
    """What one rank put into a round: seconds, of these those spent drafting, and rows that the target computed; 0 for a round
    which tells nothing about others, since it computes prompts."""

    seconds: float = 0.0
    drafting: float = 0.0
    rows: int = 0


def slowest(costs: list[Costs]) -> Costs:
    """What a group takes whose ranks measured these for the same rounds: they wait for the last."""
    first = costs[0]
    seconds = [max(each) for each in zip(*(c.seconds for c in costs), strict=True)]
    return Costs(first.rows, first.contexts, seconds, max(c.step for c in costs), max(c.row for c in costs))


@dataclass(slots=True)
class RoundCosts:
    """The table of a group, in use. A table that was measured once knows the shape: which rows are cheap.

    Two things are learnt on top: one factor for all rounds, since machines slow down, and one for every number of rows in
    the table, since requests differ from those that were tried out. The second is forgotten for more rows than there are
    now, so that what was dear once is tried again.
    """

    measured: Costs
    drift: float = 1.0
    draft_drift: float = 1.0
    _rows: Array = field(init=False)
    _table: Array = field(init=False)  # [contexts, rows]
    _factors: Array = field(init=False)  # [rows]
    _seen: Array = field(init=False)  # [rows], rounds that say so, old ones fading

    def __post_init__(self) -> None:
        self._rows = np.array(self.measured.rows, np.float64)
        self._table = np.array(self.measured.seconds, np.float64).reshape(len(self.measured.contexts), -1)
        self._factors, self._seen = np.ones_like(self._rows), np.full_like(self._rows, TRIED)

    def seconds(self, rows: Array, context: float) -> Array:
        """Of rounds with these rows, float64 of any shape; never less for more rows. In between and beyond: on a line."""
        table = self._at(context)
        last = (table[-1] - table[-2]) / (self._rows[-1] - self._rows[-2]) if len(table) > 1 else 0.0
        beyond = np.maximum(0.0, rows - self._rows[-1]) * last
        found: Array = np.interp(rows, self._rows, table) + beyond
        return found

    def drafting(self, steps: Array, rows: Array) -> Array:
        """Of a model that drafts `rows` tokens in `steps` steps."""
        return self.draft_drift * (self.measured.step * steps + self.measured.row * rows)

    def correct(self, effort: Effort, context: float, drafted: float, plain: bool) -> None:
        """Takes in a round. drafted: seconds that were expected to be spent drafting. plain: whether it had no drafts."""
        spent = effort.seconds - effort.drafting
        if drafted > 0:
            self.draft_drift *= bounded(effort.drafting / (drafted or 1.0)) ** WEIGHT
        if spent <= 0 or effort.rows > self._rows[-1]:
            return
        ratio = bounded(spent / float(self.seconds(np.array(effort.rows), context)))
        places = np.arange(len(self._rows))
        near = np.maximum(0.0, 1 - np.abs(places - np.interp(effort.rows, self._rows, places)))
        if plain:
            self.drift *= ratio**DRIFT
        more = FORGOTTEN * ((near == 0) & (self._rows > effort.rows))
        self._factors = self._factors ** (1 - more) * ratio ** (near * np.maximum(WEIGHT, 1 / (1 + self._seen)))
        self._seen = self._seen * (1 - FORGOTTEN) + near

    def _at(self, context: float) -> Array:
        """Seconds by rows at this context."""
        contexts = self.measured.contexts
        if len(contexts) == 1:
            table = self._table[0]
        else:
            share = max(0.0, (context - contexts[0]) / (contexts[-1] - contexts[0]))
            table = self._table[0] + share * np.maximum(0.0, self._table[-1] - self._table[0])
        rising: Array = np.maximum.accumulate(self.drift * self._factors * table)
        return rising


def bounded(ratio: float) -> float:
    """One round alone is no proof: something else may have had the machine."""
    return min(2.0, max(0.5, ratio))
