"""How many drafts each sequence of a group may have: chosen from what rounds cost and from what stood."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.acceptance import Acceptance
from runtime.allocation import Allocation, allocate, allocate_evenly
from runtime.costs import Effort, RoundCosts
from runtime.sequence import Sequence
from runtime.verify import Decision, Ints

PROBING = 0.01  # of the time may go into drafts that are not expected to pay; half as much into having none
LEAST = 0.1  # of a plan, that going without drafts is taken to cost, or what hardly pays would never be had
ROW = 0.01  # of a round that one more draft of every sequence is taken to cost in any case: tables are not that exact


@dataclass(slots=True)
class Tuner:
    """Chooses for a group, once for all of its ranks.

    width: the most drafts. lookups: sources that find something now and then, namely matches, by length; chains: whether
    there is one more, a model, which drafts where no match does. even: whether all sequences pay for the longest draft.
    fixed: the one number of drafts there is a choice of.

    Where nothing is drafted, nothing is learnt of drafts, and where always something is, nothing of rounds without. So a
    source that is not worth its time gets a single draft of a single sequence now and then, and now and then nobody gets any.
    What that costs is bounded by PROBING.
    """

    costs: RoundCosts
    acceptance: Acceptance
    width: int
    lookups: int
    chains: bool
    even: bool = False
    fixed: int | None = None
    _credit: float = 1.0  # for single drafts, in plans; most is to be learnt at first
    _rest: float = LEAST  # for plans without any
    _probes: int = 0
    _chained: NDArray[np.bool_] = field(init=False)  # [sources]

    def __post_init__(self) -> None:
        self._chained = np.arange(self.lookups + self.chains) >= self.lookups

    def choose(self, sequences: list[Sequence], coming: int = 0) -> list[list[int]]:
        """The most drafts by source for each of these sequences, and last for each of so many newcomers, in the coming rounds.

        These are one or more in all.
        """
        slots = np.array([s.slot for s in sequences] + [-1] * coming, np.int64)
        stands, shares = self.acceptance.stands(slots), self.acceptance.shares(slots)
        if self.chains:
            shares[:, -1] = 1 - shares[:, :-1].sum(1)
        context = sum(s.num_committed for s in sequences) / max(1, len(sequences))

        number, many = len(slots), stands.shape[1]
        least = ROW * float(self.costs.seconds(np.array(float(number)), context)) / number

        def seconds(rows: NDArray[np.float64]) -> NDArray[np.float64]:
            return self.costs.seconds(rows, context) + least * (rows - number)

        if self.fixed is None:
            owners = np.arange(number).repeat(many)
            # A row costs at least ROW of a round without drafts, shared among its tokens: so much a draft must bring.
            best = (allocate_evenly if self.even else partial(allocate, owners=owners, floor=ROW))(
                stands.reshape(number * many, -1), shares.ravel(), np.tile(self._chained, number), number, number, seconds,
                self.costs.drafting,
            )  # fmt: skip
        else:
            full = np.full(number * many, self.fixed)
            tokens = number + float((shares * stands[..., : self.fixed].sum(2)).sum())
            taken = seconds(np.array([number + float(shares.sum()) * self.fixed]))
            best = Allocation(full, tokens, float(taken[0]))
        counts = best.counts.reshape(number, many)
        rows = number + (shares * counts).sum()
        more = float(np.diff(seconds(np.array([rows, rows + 1])))[0])
        if self.chains and self.lookups:
            self._prefer(counts, stands, best, more)
        if self.fixed is None:
            self._probe(counts, shares, stands[..., 0], best, more, float(seconds(np.array(float(number)))))
        chosen: list[list[int]] = counts.tolist()
        return [*chosen[: len(sequences)], chosen[-1]]

    def _prefer(self, counts: NDArray[np.int64], stands: NDArray[np.float64], best: Allocation, row: float) -> None:
        """Takes their drafts from matches that are worth less than the model's. row: seconds of one more row."""
        reached = np.take_along_axis(
            np.concatenate([np.zeros((*counts.shape, 1)), stands.cumsum(2)], axis=2), counts[..., None], axis=2
        )[..., 0]  # fmt: skip
        chains = counts[:, -1]
        steps = self.costs.drafting(np.array(float(chains.max())), np.array(float(chains.sum())))
        spent = counts * row
        spent[:, -1] += chains * float(steps) / max(1, int(chains.sum()))
        worth = reached - best.tokens / best.seconds * spent
        counts[:, :-1] *= worth[:, :-1] >= worth[:, -1:]

    def _probe(
        self, counts: NDArray[np.int64], shares: NDArray[np.float64], first: NDArray[np.float64], best: Allocation, row: float,
        plain: float,
    ) -> None:  # fmt: skip
        """Gives one that has no drafts a single one, each in its turn, or takes all away, as soon as that is affordable.

        The price is the share of tokens that are not decided meanwhile. first: the chance that a first draft stands; row:
        seconds of one more; plain: of a round without drafts.
        """
        speed = best.tokens / best.seconds
        self._rest = min(1.0, self._rest + PROBING / 2) if counts.any() else 0.0
        price = max(LEAST, 1 - len(counts) / plain / speed)
        if counts.any() and price <= self._rest:
            self._rest -= price
            counts[:] = 0
            return
        idle = np.argwhere((counts == 0) & (shares > 0))
        if not len(idle) or self.width == 0:
            return
        self._credit = min(1.0, self._credit + PROBING)
        at, source = idle[self._probes % len(idle)]
        step = float(self.costs.drafting(np.array(1.0), np.array(1.0))) if self._chained[source] else 0.0
        lost = 1 - (best.tokens + first[at, source]) / (best.seconds + row + step) / speed
        price = max(PROBING / 5, shares[at, source] * lost)
        if price <= self._credit:
            self._credit -= price
            self._probes += 1
            counts[at, source] = 1

    def observe(self, decision: Decision, sources: Ints, effort: Effort, known: dict[int, Sequence]) -> None:
        """Takes in a round. sources: int32 [S], where drafts came from, 0 for nowhere, -1 where nobody asked. known: the
        sequences, by slot, that are still there."""
        there = np.array([slot in known for slot in decision.slots.tolist()], np.bool_)
        asked = there & (decision.num_tokens > 0) & (sources >= 0)
        if asked.any():
            slots, from_ = decision.slots[asked].astype(np.int64), sources[asked].astype(np.int64)
            self.acceptance.observe(
                slots, from_, decision.num_drafts[asked].astype(np.int64), decision.num_tokens[asked].astype(np.int64) - 1
            )
        if not known or not effort.rows:
            return
        chains = decision.num_drafts[sources > self.lookups]
        drafted = self.costs.drafting(np.array(float(chains.max(initial=0))), np.array(float(chains.sum())))
        context = sum(s.num_committed for s in known.values()) / len(known)
        self.costs.correct(effort, context, float(drafted))
