"""What rounds cost a group: measured before the first one, corrected by every one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COMMON, OWN = 0.4, 0.3  # what the table may be wrong by, as a standard deviation of a logarithm: all of it, and single rows
SLOW, FAST = 0.1, 0.05  # the same of one round: something else may have had the machine, but nothing makes a round too quick
FORGOTTEN = 1 / 1024  # of all that rounds have shown, with every other one
HOPE = 0.3  # standard deviations by which rows are believed to be cheaper, that less is known of than of others
DRAFTING = 0.1  # weight of one round in what drafting is believed to cost


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

    How far it is off is learnt from rounds: the logarithms of its errors are a Gaussian process, partly one error of all
    rows, partly one that is alike for like numbers of rows, and both wander with time, never further than they were at first
    (Ornstein and Uhlenbeck). Every round is a reading of it, taken in by a Kalman filter. So a first reading moves all rows,
    what is not seen any more is doubted again, and what was dear once is tried again.
    """

    measured: Costs
    draft_drift: float = 1.0
    _rows: Array = field(init=False)
    _table: Array = field(init=False)  # [contexts, rows]
    _prior: Array = field(init=False)  # [rows, rows], covariance
    _error: Array = field(init=False)  # [rows], mean
    _doubt: Array = field(init=False)  # [rows, rows], covariance

    def __post_init__(self) -> None:
        self._rows = np.array(self.measured.rows, np.float64)
        self._table = np.array(self.measured.seconds, np.float64).reshape(len(self.measured.contexts), -1)
        octaves = np.log2(self._rows)
        self._prior = COMMON**2 + OWN**2 * np.exp(-np.abs(octaves[:, None] - octaves))
        self._error, self._doubt = np.zeros_like(self._rows), self._prior.copy()

    def seconds(self, rows: Array, context: float) -> Array:
        """Of rounds with these rows, float64 of any shape; never less for more rows. In between and beyond: on a line."""
        spread = np.sqrt(np.maximum(0.0, self._doubt.diagonal()))
        factors = np.exp(self._error - HOPE * (spread - spread.min()))
        table = np.maximum.accumulate(factors * self._at(context))
        last = (table[-1] - table[-2]) / (self._rows[-1] - self._rows[-2]) if len(table) > 1 else 0.0
        beyond = np.maximum(0.0, rows - self._rows[-1]) * last
        found: Array = np.interp(rows, self._rows, table) + beyond
        return found

    def drafting(self, steps: Array, rows: Array) -> Array:
        """Of a model that drafts `rows` tokens in `steps` steps."""
        return self.draft_drift * (self.measured.step * steps + self.measured.row * rows)

    def correct(self, effort: Effort, context: float, drafted: float) -> None:
        """Takes in a round. drafted: seconds that were expected to be spent drafting."""
        spent = effort.seconds - effort.drafting
        if drafted > 0:
            self.draft_drift *= min(2.0, max(0.5, effort.drafting / drafted)) ** DRAFTING
        if spent <= 0 or effort.rows > self._rows[-1]:
            return
        places = np.arange(len(self._rows))
        near = np.maximum(0.0, 1 - np.abs(places - np.interp(effort.rows, self._rows, places)))
        table = float(np.interp(effort.rows, self._rows, self._at(context)))
        wrong = math.log(spent / table) - float(near @ self._error)
        noise = max(SLOW, wrong) if wrong > 0 else FAST  # the slower, the likelier that it was an accident
        shared = self._doubt @ near
        gain = shared / (near @ shared + noise**2)
        self._error = (1 - FORGOTTEN / 2) * (self._error + gain * wrong)
        self._doubt = (1 - FORGOTTEN) * (self._doubt - np.outer(gain, shared)) + FORGOTTEN * self._prior

    def _at(self, context: float) -> Array:
        """Seconds by rows at this context, as they were measured."""
        contexts = self.measured.contexts
        if len(contexts) == 1:
            return self._table[0]
        share = max(0.0, (context - contexts[0]) / (contexts[-1] - contexts[0]))
        table: Array = self._table[0] + share * np.maximum(0.0, self._table[-1] - self._table[0])
        return table
