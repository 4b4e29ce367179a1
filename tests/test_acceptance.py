"""Rates of acceptance: counts against a plain loop, chances against what is known, old news against new."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.acceptance import JOB_MEMORY, MEMORY, UNKNOWN, Acceptance, Counts

SLOTS, SOURCES, WIDTH = 3, 2, 4


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_counts_are_those_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = Acceptance(SLOTS, Counts((SOURCES, WIDTH)))
    tried, stood = np.zeros((2, SLOTS, SOURCES, WIDTH))
    job_tried, job_stood = np.zeros((2, SOURCES, WIDTH))
    found = np.zeros((SLOTS, SOURCES + 1))
    for _ in range(50):
        slots = rng.permutation(SLOTS)[: rng.integers(1, SLOTS + 1)]
        sources = rng.integers(0, SOURCES + 1, len(slots))
        drafts = np.where(sources > 0, rng.integers(0, WIDTH + 1, len(slots)), 0)
        good = np.array([rng.integers(0, n + 1) for n in drafts])
        one.observe(slots, sources, drafts, good)
        for source in range(1, SOURCES + 1):
            fades = JOB_MEMORY ** int(((sources == source) & (drafts > 0)).sum())
            job_tried[source - 1] *= fades
            job_stood[source - 1] *= fades
        for slot, source, n, g in zip(slots, sources, drafts, good, strict=True):
            found[slot] *= MEMORY
            found[slot, source] += 1
            if source == 0:
                continue
            tried[slot, source - 1] *= MEMORY
            stood[slot, source - 1] *= MEMORY
            for place in range(n):
                if place <= g:
                    tried[slot, source - 1, place] += 1
                    job_tried[source - 1, place] += 1
                if place < g:
                    stood[slot, source - 1, place] += 1
                    job_stood[source - 1, place] += 1
    for mine, theirs in (
        (one.own.tried[:SLOTS], tried), (one.own.stood[:SLOTS], stood), (one.own.found[:SLOTS], found),
        (one.job.tried, job_tried), (one.job.stood, job_stood),
    ):  # fmt: skip
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not one.own.tried[-1].any(), "what is nobody's stays so"


def test_nothing_known_is_even_odds_and_chances_never_rise() -> None:
    one = Acceptance(SLOTS, Counts((SOURCES, WIDTH)))
    stands = one.stands(ints(0, -1))
    np.testing.assert_allclose(stands, np.broadcast_to(UNKNOWN ** np.arange(1, WIDTH + 1), stands.shape))
    for _ in range(30):
        one.observe(ints(0, 1), ints(1, 2), ints(4, 2), ints(3, 0))
        stands = one.stands(ints(0, 1, 2, -1))
        assert (np.diff(stands, axis=2) <= 0).all() and (stands > 0).all() and (stands <= 1).all()


@pytest.mark.parametrize("rate", [0.1, 0.6, 0.95])
def test_rates_are_found_and_told_apart(rate: float, seed: int) -> None:
    """Slot 0 has the rate, slot 1 another; a newcomer gets what lies between; what is new wins over what was."""
    rng = np.random.default_rng(seed)
    one = Acceptance(SLOTS, Counts((SOURCES, WIDTH)))

    def check(chance: float) -> int:
        stood = 0
        while stood < WIDTH and rng.random() < chance:
            stood += 1
        return stood

    for _ in range(200):
        one.observe(ints(0, 1), ints(1, 1), ints(WIDTH, WIDTH), ints(check(rate), check(1 - rate)))
    first, second, newcomer = one.stands(ints(0, 1, -1))[:, 0, 0]
    assert abs(first - rate) < 0.25 and abs(second - (1 - rate)) < 0.25
    assert min(first, second) - 0.1 <= newcomer <= max(first, second) + 0.1
    one.forget(0)
    np.testing.assert_allclose(one.stands(ints(0)), one.stands(ints(-1)))
    for _ in range(60):
        one.observe(ints(1), ints(1), ints(WIDTH), ints(check(rate)))
    assert abs(one.stands(ints(1))[0, 0, 0] - rate) < 0.3


def test_groups_share_what_the_job_knows() -> None:
    job = Counts((SOURCES, WIDTH))
    here, there = Acceptance(SLOTS, job), Acceptance(SLOTS, job)
    for _ in range(50):
        here.observe(ints(0), ints(1), ints(WIDTH), ints(WIDTH))
    assert there.stands(ints(0))[0, 0, 0] > 0.9


def test_shares_say_how_often_something_is_found() -> None:
    one = Acceptance(SLOTS, Counts((SOURCES, WIDTH)))
    for number in range(100):
        one.observe(ints(0), ints((0, 1, 2, 1)[number % 4]), ints(0), ints(0))
    shares = one.shares(ints(0, 1))
    assert np.abs(shares - [0.5, 0.25]).max() < 0.1 and (shares.sum(1) < 1).all()
