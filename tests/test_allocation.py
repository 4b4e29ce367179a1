"""The best numbers of drafts, against every other choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from runtime.allocation import allocate, allocate_evenly, depths, prices


def tokens_per_second(counts, stands, shares, chained, base, rows, seconds, drafting):  # type: ignore[no-untyped-def]
    """Of one choice, by plain sums."""
    tokens, width, chains, depth = base, rows, 0.0, 0
    for n, count in enumerate(counts):
        tokens += shares[n] * sum(stands[n][:count])
        width += shares[n] * count
        if chained[n]:
            chains, depth = chains + shares[n] * count, max(depth, count)
    return tokens / float(seconds(np.array([width]))[0] + drafting(np.array(float(depth)), np.array(chains)))


def some_offers(rng: np.random.Generator, count: int, most: int) -> np.ndarray:
    return np.cumprod(rng.random((count, most)) ** rng.choice([0.1, 0.5, 2]), axis=1)


@pytest.mark.parametrize("kind", ["matches", "chains", "both"])
def test_no_choice_is_better(kind: str, seed: int) -> None:
    """Whatever rounds cost: here more rows cost more, in steps of any height."""
    rng = np.random.default_rng(seed)
    chosen = set()
    for _ in range(60):
        count, most = (4, 3) if rng.random() < 0.5 else (3, 4)
        stands, shares = some_offers(rng, count, most), np.ones(count)
        chained = {"matches": np.zeros(count), "chains": np.ones(count), "both": np.arange(count) % 2}[kind].astype(bool)
        table = 1 + np.cumsum(rng.random(count * most + count + 1) * rng.choice([0.01, 0.3], count * most + count + 1))
        step, row = rng.choice([0, 0.1, 0.5]), 0.0 if kind == "both" else rng.choice([0, 0.01])

        def seconds(rows: np.ndarray, table: np.ndarray = table) -> np.ndarray:
            return np.interp(rows, np.arange(len(table)), table)

        def drafting(steps: np.ndarray, rows: np.ndarray, step: float = step, row: float = row) -> np.ndarray:
            return step * steps + row * rows

        given = stands, shares, chained, count, count, seconds, drafting
        found = allocate(*given, np.arange(len(stands)))
        reached = tokens_per_second(found.counts, *given)
        assert reached == pytest.approx(found.tokens / found.seconds)
        best = max(tokens_per_second(counts, *given) for counts in product(range(most + 1), repeat=count))
        assert reached == pytest.approx(best)
        chosen |= set(found.counts.tolist())
    assert {0, 1, 2, 3} <= chosen


def test_drafts_that_are_seldom_made_are_counted_so_often(seed: int) -> None:
    """Where every row costs the same, a draft is worth it or not, however often it is made."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        stands, shares = some_offers(rng, 3, 3), rng.random(3)
        price = rng.choice([0.02, 0.2, 0.6])
        given = (
            stands, shares, np.zeros(3, bool), 2.0, 2.0, lambda rows, price=price: 1 + price * rows,
            lambda steps, rows: np.zeros(np.shape(rows)),
        )  # fmt: skip
        found = allocate(*given, np.arange(len(stands)))
        best = max(tokens_per_second(counts, *given) for counts in product(range(4), repeat=3))
        assert tokens_per_second(found.counts, *given) == pytest.approx(best)
        share = price / ((1 + 2 * price) / 2)  # what a row costs, to a token without drafts: less is never worth it
        assert (allocate(*given, np.arange(len(stands)), floor=share).counts == found.counts).all()


@pytest.mark.parametrize("sequences", [1, 3])
def test_prices_are_what_all_rounds_there_can_be_take_more(sequences: int, seed: int) -> None:
    """Up to three offers for each sequence, and drafts taken up one by one in any order that keeps an offer's own. For one
    sequence rounds cost anything; of others only moments are used, so there costs are a cubic, whose mean has no more to it."""
    rng = np.random.default_rng(seed)
    table, cubic = np.cumsum(rng.random(40)), rng.random(4) * [0.001, 0.01, 0.1, 1]

    def seconds(rows: np.ndarray) -> np.ndarray:
        return np.interp(rows, np.arange(40), table) if sequences == 1 else np.polyval(cubic, rows)

    shares = [rng.dirichlet(np.ones(1 + rng.integers(1, 4)))[1:] for _ in range(sequences)]  # what is left: nothing is found
    offers = [(owner, which) for owner, mine in enumerate(shares) for which in range(len(mine))]
    order = rng.permutation(np.repeat(np.arange(len(offers)), 3))
    counts = np.zeros(len(offers), int)
    weights, places, owners, expected = [], [], [], [float(seconds(np.array(sequences)))]
    for offer in order:
        owner, which = offers[offer]
        counts[offer] += 1
        weights.append(shares[owner][which])
        places.append(counts[offer])
        owners.append(owner)
        found = [[(1 - mine.sum(), 0)] for mine in shares]
        for (whose, nth), count in zip(offers, counts, strict=True):
            found[whose].append((shares[whose][nth], count))
        rounds = [(np.prod([chance for chance, _ in each]), sum(n for _, n in each)) for each in product(*found)]
        expected.append(sum(chance * float(seconds(np.array(sequences + n))) for chance, n in rounds))
    found_prices = prices(np.array(weights), np.array(places), np.array(owners), float(sequences), seconds)
    np.testing.assert_allclose(found_prices, np.diff(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_one_offer_costs_what_its_rounds_do(share: float, seed: int) -> None:
    """A round has all of the drafts or none: where it is seldom made, what its rows cost is still what those rounds cost."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        stands, table = some_offers(rng, 1, 8), 1 + np.cumsum(rng.random(10) * rng.choice([0.01, 0.5], 10))

        def reached(count: int, stands: np.ndarray = stands, table: np.ndarray = table) -> float:
            taken = share * table[1 + count] + (1 - share) * table[1]
            return float((1 + share * stands[0, :count].sum()) / taken)

        found = allocate(
            stands, np.array([share]), np.zeros(1, bool), 1.0, 1.0,
            lambda rows, table=table: np.interp(rows, np.arange(10), table), lambda steps, rows: np.zeros(np.shape(rows)),
            np.zeros(1, np.int64),
        )  # fmt: skip
        assert reached(int(found.counts[0])) == pytest.approx(max(map(reached, range(9))))
        assert found.tokens / found.seconds == pytest.approx(reached(int(found.counts[0])))


def test_evenly_is_the_best_of_all_equal_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        stands, shares = some_offers(rng, 4, 5), rng.random(4)
        price, step = rng.choice([0.01, 0.1, 0.5]), rng.choice([0, 0.2])
        chained = rng.random(4) < 0.5

        def reached(depth: int, stands=stands, shares=shares, chained=chained, price=price, step=step) -> float:  # type: ignore[no-untyped-def]
            tokens = 4 + (shares[:, None] * stands[:, :depth]).sum()
            return float(tokens / (1 + price * 4 * (depth + 1) + step * depth + 0.01 * depth * shares[chained].sum()))

        found = allocate_evenly(
            stands, shares, chained, 4, 4, lambda rows, price=price: 1 + price * rows,
            lambda steps, rows, step=step: step * steps + 0.01 * rows,
        )  # fmt: skip
        assert len(set(found.counts.tolist())) == 1
        assert reached(int(found.counts[0])) == pytest.approx(max(map(reached, range(6))))
        assert found.tokens / found.seconds == pytest.approx(reached(int(found.counts[0])))


@pytest.mark.parametrize("most", [0, 1, 5, 7, 32, 64, 200])
def test_depths_begin_and_end_with_the_ends(most: int) -> None:
    tried = depths(most)
    assert tried[0] == 0 and tried[-1] == most and tried == sorted(set(tried))
