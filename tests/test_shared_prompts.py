"""Copies of one prompt within a group: who waits for whom, who holds which block, and for how long."""

from __future__ import annotations

from collections import deque

from runtime.sequence import Sequence
from tests.test_group import group, sequence


def family(num_prompt: int, copies: int, wanted: int = 8) -> deque[Sequence]:
    return deque(sequence(0, num_prompt, wanted, copy) for copy in range(copies))


def test_copies_come_once_the_first_has_computed_their_prompt_and_hold_its_blocks() -> None:
    one = group(blocks=40, rounds=1, ahead=0, width=0, block_size=2)
    waiting = family(num_prompt=8, copies=3)
    other = sequence(1, 8, 8)
    waiting.append(other)
    first, second, third, _ = waiting
    plan = one.plan(waiting, 4)
    assert plan is not None and [(a.index, a.copy) for a in plan.admit] == [(0, 0), (1, 0)], "others need not wait"
    assert list(waiting) == [second, third]
    one.under_way.clear()
    assert (plan := one.plan(waiting, 4)) is not None and plan.admit == []
    one.under_way.clear()
    first.commit([5])
    plan = one.plan(waiting, 4)
    assert plan is not None and [(a.copy, a.num_computed) for a in plan.admit] == [(1, 6), (2, 6)]
    assert first.blocks[:3] == second.blocks[:3] == third.blocks[:3], "the fourth block holds the last token of the prompt"
    assert len({s.blocks[3] for s in (first, second, third)}) == 3
    for leaver, holders in ((first, 2), (third, 1), (second, 0)):
        shared = leaver.blocks[:3]
        one.retire(leaver)
        assert [one.pool._holders[block] for block in shared] == [holders] * 3
    one.retire(other)
    assert one.pool.num_free == 40


def test_a_prompt_within_one_block_is_not_waited_for() -> None:
    one = group(blocks=40, block_size=8)
    plan = one.plan(family(num_prompt=8, copies=3), 4)
    assert plan is not None and [a.copy for a in plan.admit] == [0, 1, 2]


def test_a_prompt_outlives_its_first_copy_as_long_as_another_waits() -> None:
    one = group(blocks=40, slots=1, rounds=1, ahead=0, block_size=2)
    waiting = family(num_prompt=6, copies=2)
    first, second = waiting
    one.plan(waiting, 1)
    prompt = first.blocks[:2]
    first.commit([5])
    one.under_way.clear()
    one.retire(first, heirs=True)
    plan = one.plan(waiting, 1)
    assert plan is not None and plan.admit[0].num_computed == 4 and second.blocks[:2] == prompt
    one.under_way.clear()
    one.plan(waiting, 1)
    assert not one.kept, "the last copy is there"


def test_what_is_kept_for_later_goes_before_anyone_has_to() -> None:
    one = group(blocks=6, slots=2, rounds=1, ahead=0, width=0, block_size=2)
    waiting = family(num_prompt=6, copies=2)
    first = waiting[0]
    one.plan(waiting, 1)
    first.commit([5])
    one.under_way.clear()
    one.retire(first, heirs=True)
    long = sequence(1, 4, 9)
    waiting.appendleft(long)
    while long.finish_reason is None:
        assert one.plan(waiting, 1) is not None
        long.commit([5])
        one.under_way.clear()
    assert not one.leaving and not one.kept


def test_who_wants_the_log_probabilities_of_the_prompt_computes_it() -> None:
    one = group(blocks=40, block_size=2)
    waiting = family(num_prompt=6, copies=2)
    waiting[1].borrows = False
    plan = one.plan(waiting, 4)
    assert plan is not None and [(a.copy, a.num_computed) for a in plan.admit] == [(0, 0), (1, 0)]
