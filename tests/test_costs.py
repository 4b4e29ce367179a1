"""What rounds are believed to cost: the table, lines between its entries, and how it follows what is told."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.costs import Costs, Effort, RoundCosts, slowest


def table() -> RoundCosts:
    return RoundCosts(Costs([1, 2, 8], [10, 110], [1.0, 2.0, 8.0, 2.0, 4.0, 16.0], step=0.5, row=0.25))


@pytest.mark.parametrize(
    ("rows", "context", "seconds"),
    [(1, 10, 1), (8, 10, 8), (5, 10, 5), (10, 10, 10), (2, 110, 4), (2, 60, 3), (2, 0, 2), (2, 210, 6), (0, 10, 1)],
)
def test_between_and_beyond_what_was_measured(rows: float, context: float, seconds: float) -> None:
    assert table().seconds(np.array([rows]), context)[0] == pytest.approx(seconds)


def test_drafting() -> None:
    assert table().drafting(np.array(3.0), np.array(4.0)) == 2.5


def test_the_slowest_rank_counts() -> None:
    mine, other = Costs([1, 2], [10], [1.0, 5.0], 0.1, 0.3), Costs([1, 2], [10], [2.0, 4.0], 0.2, 0.1)
    assert slowest([mine, other]) == Costs([1, 2], [10], [2.0, 5.0], 0.2, 0.3)


def test_it_follows_what_rounds_take() -> None:
    one = table()
    for _ in range(60):
        one.correct(Effort(7.0, 1.0, 2), 10, 0.5)
    assert one.seconds(np.array([2.0]), 10)[0] == pytest.approx(6, rel=0.1)
    assert one.drafting(np.array(1.0), np.array(0.0)) > 0.5, "drafting took longer than it was said to"
    for _ in range(60):
        one.correct(Effort(3.0, 0.0, 1), 10, 0.0)
    assert 8 < one.seconds(np.array([8.0]), 10)[0] < 24, "of other numbers of rows less is known"


@pytest.mark.parametrize("slow", [10.0, 16.0, 32.0, 1e9])
def test_one_odd_round_proves_little(slow: float) -> None:
    one = table()
    one.correct(Effort(0.0, 0.0, 8), 10, 0.0)
    one.correct(Effort(5.0, 0.0, 999), 10, 0.0)  # of no size that was tried
    assert one.seconds(np.array([8.0]), 10)[0] == 8
    one.correct(Effort(slow, 0.0, 8), 10, 0.0)
    eight, single = one.seconds(np.array([8.0, 1.0]), 10)
    assert 8 <= eight < 1.2 * 8 * single


def test_what_is_not_confirmed_is_forgotten() -> None:
    one = table()
    for _ in range(40):
        one.correct(Effort(32.0, 0.0, 8), 10, 0.0)
    dear = one.seconds(np.array([8.0]), 10)[0] / one.seconds(np.array([1.0]), 10)[0]
    for _ in range(6000):
        one.correct(Effort(1.0, 0.0, 1), 10, 0.0)
    assert one.seconds(np.array([8.0]), 10)[0] / one.seconds(np.array([1.0]), 10)[0] < 9 < dear


def test_more_rows_never_take_less() -> None:
    one = RoundCosts(Costs([1, 2, 3], [0], [1.0, 3.0, 2.0]))
    assert (np.diff(one.seconds(np.arange(1.0, 9.0), 0)) >= 0).all()
