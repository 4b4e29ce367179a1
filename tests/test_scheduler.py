"""What a round computes: within its budget, within every sequence's blocks and limit, decoding before prompts."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from runtime.blocks import blocks_for
from runtime.scheduler import Work, schedule
from runtime.sequence import Sampling, Sequence


def sequence(slot: int, committed: int, computed: int, limit: int, blocks: int) -> Sequence:
    return Sequence(
        index=slot, slot=slot, tokens=list(range(committed)), num_prompt=1, limit=limit, ends=frozenset(),
        sampling=Sampling(), num_computed=computed, blocks=list(range(blocks)), allowance=[1, 4],
    )  # fmt: skip


def decoding(slot: int, committed: int = 10, limit: int = 100, blocks: int = 10) -> Sequence:
    return sequence(slot, committed, committed - 1, limit, blocks)


def prompt(slot: int, length: int, blocks: int = 10) -> Sequence:
    return sequence(slot, length, 0, 100, blocks)


def shares(works: list[Work]) -> list[tuple[int, int, int, bool]]:
    return [(work.sequence.slot, work.count, work.num_drafts, work.decides) for work in works]


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Sequence], int, int]:
    block_size = draw(st.sampled_from([1, 2, 8]))
    sequences = []
    for slot in range(draw(st.integers(0, 6))):
        committed = draw(st.integers(1, 30))
        computed = draw(st.integers(0, committed - 1) | st.just(committed - 1))
        needed = blocks_for(max(1, computed), block_size)
        blocks = draw(st.integers(needed, needed + 12))
        one = sequence(slot, committed, computed, committed + draw(st.integers(1, 12)), blocks)
        one.allowance = draw(st.lists(st.integers(0, 6), max_size=3))
        if draw(st.integers(0, 5)) == 0:
            one.finish("stop")
        sequences.append(one)
    return sequences, draw(st.integers(1, 60)), block_size


@given(situations())
def test_limits_hold(situation: tuple[list[Sequence], int, int]) -> None:
    sequences, budget, block_size = situation
    works = schedule(sequences, budget, block_size)
    assert sum(work.count + work.num_drafts for work in works) <= budget
    order = [work.sequence.slot for work in works]
    assert order == sorted(order), "works come in order of admission, each sequence once at most"
    for work in works:
        s = work.sequence
        assert s.finish_reason is None
        assert work.start == s.num_computed and work.count >= 1
        assert work.start + work.count <= s.num_committed
        assert work.decides == (work.start + work.count == s.num_committed)
        assert 0 <= work.num_drafts <= (max(s.allowance, default=0) if work.decides else 0)
        assert work.start + work.count + work.num_drafts <= len(s.blocks) * block_size
        assert s.num_committed + work.num_drafts + 1 <= max(s.limit, s.num_committed + 1)


@given(situations())
def test_nothing_is_left_idle(situation: tuple[list[Sequence], int, int]) -> None:
    """A sequence goes without work, and budget without use, only where it must."""
    sequences, budget, block_size = situation
    works = {work.sequence.slot: work for work in schedule(sequences, budget, block_size)}
    left = budget - sum(work.count + work.num_drafts for work in works.values())
    ready = [s for s in sequences if s.finish_reason is None]
    for s in ready:
        room = len(s.blocks) * block_size - s.num_computed
        work = works.get(s.slot)
        if left > 0:
            count = work.count if work else 0
            assert count == min(s.num_committed - s.num_computed, room)
            if work and work.decides:
                assert work.num_drafts == max(0, min(max(s.allowance, default=0), s.limit - s.num_committed - 1, room - count))
    if any(len(s.blocks) * block_size > s.num_computed for s in ready):
        assert works, "somebody could go on, and nobody does"


@given(situations())
def test_who_needs_one_token_comes_first(situation: tuple[list[Sequence], int, int]) -> None:
    sequences, budget, block_size = situation
    served = {work.sequence.slot for work in schedule(sequences, budget, block_size)}
    ready = [s for s in sequences if s.finish_reason is None and len(s.blocks) * block_size > s.num_computed]
    next_tokens = [s.slot for s in ready if s.num_committed - s.num_computed == 1]
    assert set(next_tokens[:budget]) <= served


def test_a_long_prompt_holds_nobody_up() -> None:
    works = schedule([prompt(0, 50), decoding(1), decoding(2)], budget=12, block_size=8)
    assert shares(works) == [(0, 10, 0, False), (1, 1, 0, True), (2, 1, 0, True)]


def test_a_prompt_comes_before_drafts() -> None:
    works = schedule([decoding(0), prompt(1, 6)], budget=10, block_size=8)
    assert shares(works) == [(0, 1, 3, True), (1, 6, 0, True)]


def test_prompts_are_served_in_order_of_admission() -> None:
    works = schedule([prompt(5, 6), prompt(0, 6)], budget=8, block_size=8)
    assert shares(works) == [(5, 6, 0, True), (0, 2, 0, False)]


def test_no_draft_beyond_the_limit() -> None:
    works = schedule([decoding(0, 10, 11), decoding(1, 10, 13)], budget=50, block_size=8)
    assert shares(works) == [(0, 1, 0, True), (1, 1, 2, True)]


def test_no_draft_beyond_what_is_allowed() -> None:
    one, other = decoding(0), decoding(1)
    one.allowance, other.allowance = [0, 2, 1], []
    [work, last] = schedule([one, other], budget=50, block_size=8)
    assert (work.num_drafts, last.num_drafts) == (2, 0)
    assert [work.most(source) for source in (1, 2, 3)] == [0, 2, 1]


def test_no_token_beyond_the_blocks() -> None:
    works = schedule([decoding(0, 17, blocks=2), decoding(1, 15, blocks=2), prompt(2, 20, 2)], 50, 8)
    assert shares(works) == [(1, 1, 1, True), (2, 16, 0, False)]


def test_nobody_is_there() -> None:
    assert schedule([], 10, 8) == []
    finished = decoding(0)
    finished.finish("stop")
    assert schedule([finished], 10, 8) == []


def test_the_plan_depends_on_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    group = [prompt(slot, rng.randint(2, 30)) for slot in range(5)]
    assert schedule(group, 20, 8) == schedule(iter(group), 20, 8)
