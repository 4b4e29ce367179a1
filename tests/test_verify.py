"""Merging and deciding, against loops that cannot be wrong."""

from __future__ import annotations

import dataclasses
import random
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.verify import NOTHING, Decision, NotANumber, decide, merge

Pair = tuple[float, int]


def winner(pairs: list[Pair]) -> int:
    top = max(score for score, _ in pairs)
    return NOTHING if top == -np.inf else min(token for score, token in pairs if score == top)


def merged(pairs: list[Pair]) -> int:
    scores = np.array([[score] for score, _ in pairs], np.float32)
    return int(merge(scores, np.array([[token] for _, token in pairs], np.int32))[0])


few_scores = st.sampled_from([-np.inf, -1.5, 0.0, -0.0, 2.0, 1e30])  # few, so that ties are common
pair_lists = st.lists(st.tuples(few_scores, st.integers(0, 9)), min_size=1, max_size=5)


@given(pair_lists)
def test_the_larger_score_wins_and_the_smaller_id_on_ties(pairs: list[Pair]) -> None:
    assert merged(pairs) == winner(pairs)


@given(pair_lists)
def test_order_of_arrival_does_not_matter(pairs: list[Pair]) -> None:
    assert len({merged(list(order)) for order in permutations(pairs[:4])}) == 1


@given(pair_lists, pair_lists)
def test_parts_can_be_merged_first(left: list[Pair], right: list[Pair]) -> None:
    def pair(pairs: list[Pair]) -> Pair:
        return max(score for score, _ in pairs), merged(pairs)

    assert merged([pair(left), pair(right)]) == merged(left + right)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_merge_goes_row_by_row(ranks: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (ranks, rows)).astype(np.float32)
    ids = rng.integers(0, 100, (ranks, rows)).astype(np.int32)
    result = merge(scores, ids)
    assert result.dtype == np.int32
    assert result.tolist() == [winner(list(zip(scores[:, r], ids[:, r].tolist(), strict=True))) for r in range(rows)]


def test_not_a_number_decides_nothing() -> None:
    with pytest.raises(NotANumber):
        merge(np.array([[0.0, 1.0], [np.nan, 0.0]], np.float32), np.zeros((2, 2), np.int32))


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 0.9, 1.0])
def test_decide_is_the_obvious_loop(accuracy: float, seed: int) -> None:
    rng = random.Random(f"{seed} {accuracy}")
    for _ in range(200):
        slots = rng.sample(range(50), rng.randint(0, 6))
        decides, num_drafts, drafts, targets, expected = [], [], [], [], []
        for _slot in slots:
            decides.append(rng.random() < 0.7)
            count = rng.randint(0, 4) if decides[-1] else 0
            num_drafts.append(count)
            target = [rng.randrange(5) for _ in range(count + 1)] if decides[-1] else []
            draft = [target[i] if rng.random() < accuracy else rng.randrange(5) for i in range(count)]
            drafts += draft
            targets += target
            tokens: list[int] = []
            for i, token in enumerate(target):
                tokens.append(token)
                if i == count or draft[i] != token:
                    break
            expected.append(tokens)
        decision = decide(ints(slots), np.array(decides, bool), ints(num_drafts), ints(drafts), ints(targets))
        assert decision.slots.tolist() == slots and decision.num_drafts.tolist() == num_drafts
        assert decision.num_tokens.tolist() == [len(tokens) for tokens in expected]
        assert decision.tokens.tolist() == [token for tokens in expected for token in tokens]
        assert decision.tokens.dtype == decision.num_tokens.dtype == np.int32


def test_a_right_draft_after_a_wrong_one_does_not_stand() -> None:
    decision = decide(ints([3]), np.array([True]), ints([3]), ints([5, 9, 7]), ints([5, 6, 7, 8]))
    assert decision.tokens.tolist() == [5, 6]


def test_all_drafts_stand_and_one_more() -> None:
    decision = decide(ints([3]), np.array([True]), ints([3]), ints([5, 6, 7]), ints([5, 6, 7, 8]))
    assert decision.tokens.tolist() == [5, 6, 7, 8]


BASE = Decision(ints([1, 2]), ints([2, 0]), ints([1, 1]), ints([7, 8]))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Decision)])
@pytest.mark.parametrize("at", [0, 1])
def test_digest_changes_with_every_number(name: str, at: int) -> None:
    changed = getattr(BASE, name).copy()
    changed[at] += 1
    assert dataclasses.replace(BASE, **{name: changed}).digest() != BASE.digest()


def test_digest_covers_what_was_before() -> None:
    assert BASE.digest(b"") == BASE.digest(b"") and len(BASE.digest()) == 8
    assert BASE.digest(BASE.digest()) != BASE.digest()


def test_digest_sees_where_one_array_ends_and_the_next_begins() -> None:
    one = Decision(ints([1]), ints([2]), ints([4]), ints([0, 1, 0, 9]))
    two = Decision(ints([1, 2]), ints([4, 0]), ints([1, 0]), ints([9]))
    assert one.digest() != two.digest()
