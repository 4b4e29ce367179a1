"""Numbers of drafts that are chosen: by cost, by what stands, again and again, and the same for the same reports."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from runtime.acceptance import Acceptance, Counts
from runtime.costs import Costs, Effort, RoundCosts
from runtime.sequence import Sampling, Sequence
from runtime.tuner import Tuner
from runtime.verify import Decision

WIDTH, LOOKUPS = 8, 2
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def costs(row: float, step: float = 0.0) -> Costs:
    """A round of 10 ms, and `row` of that more for every row."""
    return Costs(ROWS, [10], [0.01 * (1 + row * rows) for rows in ROWS], step=step)


def tuner(batch: int, row: float, chains: bool = False, **more: object) -> Tuner:
    counts = Counts((LOOKUPS + chains, WIDTH))
    return Tuner(RoundCosts(costs(row, 0.002)), Acceptance(batch, counts), WIDTH, LOOKUPS, chains, **more)  # type: ignore[arg-type]


@dataclass(slots=True)
class Group:
    """Sequences whose matches are found and stand by chance. rates: of a draft, by source. row: what rows cost in truth."""

    tuner: Tuner
    batch: int
    rates: list[float]
    rng: random.Random
    row: float
    sequences: list[Sequence] = field(init=False)
    widest: list[int] = field(default_factory=list)  # number of drafts, by plan

    def __post_init__(self) -> None:
        self.sequences = [Sequence(i, i, [1] * 20, 1, 10**6, frozenset(), Sampling()) for i in range(self.batch)]

    def run(self, plans: int) -> float:
        """Tokens a second."""
        tokens = seconds = 0.0
        for _ in range(plans):
            *chosen, _ = self.tuner.choose(self.sequences)
            self.widest.append(sum(map(max, chosen)))
            for _ in range(4):
                sources = [self.rng.randrange(LOOKUPS + 1) if max(mine) else -1 for mine in chosen]
                chain = LOOKUPS + 1
                sources = [
                    chain if self.tuner.chains and s >= 0 and not (s and mine[s - 1]) and mine[-1] else s
                    for s, mine in zip(sources, chosen, strict=True)
                ]
                drafts = [mine[s - 1] if s > 0 else 0 for s, mine in zip(sources, chosen, strict=True)]
                stood = [self.stand(s, n) for s, n in zip(sources, drafts, strict=True)]
                rows = self.batch + sum(drafts)
                taken = 0.01 * (1 + self.row * rows)
                decision = Decision(
                    np.arange(self.batch, dtype=np.int32), np.array(drafts, np.int32), np.array(stood, np.int32) + 1,
                    np.zeros(0, np.int32),
                )  # fmt: skip
                known = dict(enumerate(self.sequences))
                self.tuner.observe(decision, np.array(sources, np.int32), Effort(taken, 0.0, rows), known)
                tokens += self.batch + sum(stood)
                seconds += taken
        return tokens / seconds

    def stand(self, source: int, drafts: int) -> int:
        count = 0
        while count < drafts and self.rng.random() < self.rates[source - 1]:
            count += 1
        return count


def settled(group: Group) -> list[list[int]]:
    """What the next plan allows that allows anything: now and then none does, to see what that gives."""
    while True:
        *chosen, _ = group.tuner.choose(group.sequences)
        if any(map(any, chosen)):
            return chosen


def test_cheap_rows_and_good_drafts_are_used_and_dear_rows_are_not(seed: int) -> None:
    many, few = (Group(tuner(4, row), 4, [0.3, 0.7], random.Random(seed), row) for row in (0.001, 2.0))
    many.run(40)
    few.run(40)
    assert np.mean(many.widest[20:]) > 16 and np.mean(few.widest[20:]) < 2
    allowed = settled(many)[0]
    assert allowed[1] > allowed[0], "of the better matches more is drafted"


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_drafts_that_never_stand_cost_next_to_nothing(batch: int, seed: int) -> None:
    one = Group(tuner(batch, 0.1), batch, [0.02, 0.02], random.Random(seed), 0.1)
    one.run(15)
    plain = batch / (0.01 * (1 + 0.1 * batch))
    assert one.run(100) >= 0.97 * plain
    assert max(one.widest[15:]) == 1, "now and then one is tried"


def test_rows_that_turn_dear_are_left_and_taken_up_again(seed: int) -> None:
    one = Group(tuner(8, 0.01), 8, [0.4, 0.4], random.Random(seed), 0.01)
    one.run(60)
    before = np.median(one.widest[-20:])
    one.row = 0.25
    one.run(200)
    dear = one.run(100)
    assert dear >= 0.95 * 8 / (0.01 * (1 + 0.25 * 8)), "much slower than without drafts"
    assert np.median(one.widest[-20:]) < before / 2
    one.row = 0.01
    one.run(600)
    assert np.median(one.widest[-20:]) > before / 2


@pytest.mark.parametrize("batch", [1, 4])
def test_a_table_that_was_measured_amid_other_work_is_soon_put_right(batch: int, seed: int) -> None:
    one = Group(tuner(batch, 1.0), batch, [0.9, 0.9], random.Random(seed), 0.02)  # it says that each row doubles a round
    one.run(100)
    right = Group(tuner(batch, 0.02), batch, [0.9, 0.9], random.Random(seed), 0.02)
    right.run(100)
    assert one.run(200) > 0.9 * right.run(200)


def test_drafts_that_begin_to_stand_are_noticed(seed: int) -> None:
    one = Group(tuner(4, 0.1), 4, [0.02, 0.02], random.Random(seed), 0.1)
    one.run(60)
    one.rates = [0.95, 0.95]
    one.run(600)
    assert np.mean(one.widest[-20:]) > 4


@pytest.mark.parametrize(("rates", "model_wins"), [([0.1, 0.1, 0.9], True), ([0.95, 0.95, 0.3], False)])
def test_what_stands_is_picked(rates: list[float], model_wins: bool, seed: int) -> None:
    one = Group(tuner(4, 0.01, chains=True), 4, rates, random.Random(seed), 0.01)
    one.run(60)
    chosen = settled(one)
    picked = [mine[2] > 0 and not any(mine[:2]) if model_wins else min(mine[:2]) > 0 for mine in chosen]
    assert sum(picked) >= 3, "but for a probe now and then"


def test_a_fixed_number_leaves_the_choice_of_drafters(seed: int) -> None:
    one = Group(tuner(4, 0.01, chains=True, fixed=3), 4, [0.05, 0.95, 0.6], random.Random(seed), 0.01)
    one.run(60)
    assert settled(one)[0] == [0, 3, 3]


def test_evenly_is_one_number_for_all(seed: int) -> None:
    one = Group(tuner(4, 0.01, even=True), 4, [0.3, 0.9], random.Random(seed), 0.01)
    one.run(20)
    assert len({number for mine in settled(one) for number in mine}) == 1


def test_the_same_reports_give_the_same_numbers(seed: int) -> None:
    first, again = (Group(tuner(4, 0.02, chains=True), 4, [0.3, 0.9, 0.5], random.Random(seed), 0.03) for _ in range(2))
    first.run(30)
    again.run(30)
    assert first.widest == again.widest and len(set(first.widest)) > 1
