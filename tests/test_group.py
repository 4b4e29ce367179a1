"""A group's plans: random arrivals, commits, ends and full caches must never lose a block, a slot or a sequence."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.blocks import BlockPool, blocks_for
from runtime.group import Group, Limits
from runtime.messages import Admission, Plan
from runtime.sequence import Sampling, Sequence

Name = tuple[int, int]


def sequence(index: int, num_prompt: int, wanted: int, copy: int = 0) -> Sequence:
    return Sequence(index, -1, list(range(num_prompt)), num_prompt, num_prompt + wanted, frozenset(), Sampling(), copy=copy)


def check_owners(sequences: list[Sequence], kept: dict[int, list[int]], block_size: int) -> set[int]:
    """All blocks that are held. A block has two owners only as one and the same whole block of one prompt."""
    owners: dict[int, set[tuple[int, int]]] = {}
    alone: list[int] = []
    for s in sequences:
        assert len(set(s.blocks)) == len(s.blocks)
        for place, block in enumerate(s.blocks):
            owners.setdefault(block, set()).add((s.index, place))
            if (place + 1) * block_size >= s.num_prompt:
                alone.append(block)
    for index, blocks in kept.items():
        for place, block in enumerate(blocks):
            owners.setdefault(block, set()).add((index, place))
    assert all(len(places) == 1 for places in owners.values()), "two sequences hold one block for different things"
    held = [block for s in sequences for block in s.blocks] + [block for blocks in kept.values() for block in blocks]
    assert all(held.count(block) == 1 for block in alone), "two sequences would write one block"
    return set(owners)


class GroupMachine(RuleBasedStateMachine):
    """Plays the coordinator and the ranks; `there` is what the ranks hold once they have carried out every plan."""

    @initialize(
        slots=st.integers(1, 4), block_size=st.sampled_from([1, 2, 4]), width=st.integers(0, 3), rounds=st.integers(1, 4),
        ahead=st.integers(0, 1), blocks=st.integers(1, 24),
    )  # fmt: skip
    def begin(self, slots: int, block_size: int, width: int, rounds: int, ahead: int, blocks: int) -> None:
        limits = Limits(slots, block_size, width, rounds if ahead else 1, ahead)
        self.group = Group(0, (0,), limits, BlockPool(blocks))
        self.waiting: deque[Sequence] = deque()
        self.all: list[Sequence] = []
        self.seen: list[list[int]] = []
        self.there: dict[int, tuple[Name, list[int]]] = {}  # slot -> name, blocks
        self.requests = 0
        self.computed: dict[tuple[int, ...], int] = {}  # the first blocks of a prompt -> its request, once computed
        self.number = 0

    @rule(num_prompt=st.integers(1, 20), wanted=st.integers(1, 12), copies=st.sampled_from([1, 1, 2, 4]))
    def arrive(self, num_prompt: int, wanted: int, copies: int) -> None:
        self.requests += 1
        for copy in range(copies):
            newcomer = sequence(self.requests, num_prompt, wanted, copy)
            newcomer.borrows = copy != 1
            if self.group.can_ever_hold(newcomer.limit):
                self.waiting.append(newcomer)
                self.all.append(newcomer)
                self.seen.append(list(newcomer.tokens))

    @rule(share=st.integers(1, 5))
    def plan(self, share: int) -> None:
        group, limits = self.group, self.group.limits
        before = group.rounds_under_way
        waited, earlier = list(self.waiting), list(group.under_way)
        plan = group.plan(self.waiting, share)
        if before > limits.ahead:
            assert plan is None, "a plan was sent before it was time"
        if plan is None:
            return
        self.carry_out(plan)
        assert plan.rounds == limits.rounds
        admitted = {(a.index, a.copy) for a in plan.admit}
        assert [(a.index, a.copy) for a in plan.admit] == [s.name for s in waited if s.name in admitted], "not in order"
        assert [s.name for s in self.waiting] == [s.name for s in waited if s.name not in admitted], "not in order"
        last = max((at for at, s in enumerate(waited) if s.name in admitted), default=0)
        passed_over = {s.index for s in waited[:last] if s.name not in admitted}
        assert passed_over <= {s.index for s in group.running.values()}, "nobody computes what they wait for"
        assert len(group.running) <= limits.max_num_seqs
        assert not plan.admit or len(group.running) <= share
        for s in group.running.values():
            rounds = sum(p.rounds_left for p in earlier if p.sequences.get(s.slot) is s)
            needed = min(s.limit - 1, s.num_committed + (rounds + 1) * (limits.width + 1))
            assert len(s.blocks) * limits.block_size >= needed, "not even one round fits into its blocks"
            assert len(s.blocks) <= blocks_for(s.limit - 1, limits.block_size)

    def carry_out(self, plan: Plan) -> None:
        """What the ranks do with it; they know only what plans have told them."""
        self.number += 1
        assert plan.number == self.number
        for slot in plan.release:
            del self.there[slot]
        for newcomer in plan.admit:
            assert newcomer.slot not in self.there, "the slot is taken"
            name = newcomer.index, newcomer.copy
            [known] = [s for s in self.all if s.name == name]
            assert newcomer.tokens == known.tokens
            self.check_admission(newcomer, known)
            assert newcomer.slot in plan.tables
            self.there[newcomer.slot] = (name, [])
        for slot, blocks in plan.tables.items():
            self.there[slot] = (self.there[slot][0], blocks)
        running = {slot: (s.name, s.blocks) for slot, s in self.group.running.items()}
        assert self.there == running, "the ranks and the coordinator know different things"
        check_owners(list(self.group.running.values()), self.group.kept, self.group.limits.block_size)

    def check_admission(self, newcomer: Admission, known: Sequence) -> None:
        """What it finds computed is whole blocks of its prompt that have been computed for a copy of it."""
        whole = (known.num_prompt - 1) // self.group.limits.block_size
        assert newcomer.num_computed in (0, whole * self.group.limits.block_size)
        if newcomer.num_computed:
            assert known.borrows
            assert tuple(known.blocks[:whole]) in self.computed, "nobody has computed these blocks"
            assert self.computed[tuple(known.blocks[:whole])] == known.index

    @precondition(lambda self: self.group.under_way)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A round of the oldest plan: every sequence gets some tokens or none, some end, the plan may end early."""
        plan = self.group.under_way[0]
        most = self.group.limits.width + 1
        tokens = {s.name: data.draw(st.integers(0, most), label=f"tokens of {s.name}") for s in plan.sequences.values()}
        ended = data.draw(st.sets(st.sampled_from(sorted(tokens)), max_size=1)) if tokens else set()
        self.finish_round(tokens, ended, last=data.draw(st.integers(0, 9), label="last if 0") == 0)

    def finish_round(self, tokens: dict[Name, int], ended: set[Name], last: bool) -> None:
        group = self.group
        plan = group.under_way[0]
        plan.rounds_left -= 1
        if last or plan.rounds_left == 0:
            group.under_way.popleft()
        for s in plan.sequences.values():
            if s.finish_reason is None:
                if tokens.get(s.name):
                    s.commit([7] * tokens[s.name])
                    whole = (s.num_prompt - 1) // group.limits.block_size
                    self.computed[tuple(s.blocks[:whole])] = s.index
                if s.name in ended:
                    s.finish("stop")
                if s.finish_reason is not None:
                    group.retire(s, heirs=any(other.index == s.index for other in self.waiting))

    @rule()
    def take_back(self) -> None:
        back = self.group.returned()
        for s in back:
            assert all(s is not other for plan in self.group.under_way for other in plan.sequences.values())
            assert not s.blocks and s.finish_reason is None
        self.waiting.extendleft(back)

    @invariant()
    def every_block_has_its_owners(self) -> None:
        if not hasattr(self, "group"):
            return
        group = self.group
        held = check_owners(list(group.running.values()), group.kept, group.limits.block_size)
        assert sorted([*held, *group.pool._free]) == list(range(group.pool.size)), "a block leaked"
        assert not any(s.blocks for s in self.all if s not in self.group.running.values())

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        if not hasattr(self, "group"):
            return
        assert all(s.slot == slot for slot, s in self.group.running.items())
        assert sorted([*self.group.running, *self.group._free_slots]) == list(range(self.group.limits.max_num_seqs))

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        if not hasattr(self, "group"):
            return
        places = [*self.waiting, *self.group.running.values(), *(s for _, s in self.group.leaving if s.finish_reason is None)]
        places += [s for s in self.all if s.finish_reason is not None]
        assert sorted(s.name for s in places) == sorted(s.name for s in self.all)

    @invariant()
    def committed_tokens_never_change(self) -> None:
        for at, s in enumerate(getattr(self, "all", [])):
            assert s.tokens[: len(self.seen[at])] == self.seen[at]
            assert s.num_committed <= s.limit
            self.seen[at] = list(s.tokens)

    def teardown(self) -> None:
        """From wherever chance has led, everything must come to an end in a bounded number of rounds."""
        if not hasattr(self, "group"):
            return
        group = self.group
        for _ in range(2 * sum(s.limit for s in self.all) + 100):
            self.take_back()
            self.plan(max(1, len(self.waiting) + len(group.running)))
            self.every_block_has_its_owners()
            if group.under_way:
                # At the worst, only the oldest goes on, by one token a round, and nothing it didn't need.
                oldest = next(iter(group.under_way[0].sequences.values()))
                self.finish_round({oldest.name: 1}, set(), last=True)
        assert all(s.finish_reason is not None for s in self.all), "somebody never gets on"
        self.take_back()
        assert self.group.plan(self.waiting, 1) is None and not group.kept
        assert group.idle and group.pool.num_free == group.pool.size


TestGroupMachine = GroupMachine.TestCase
TestGroupMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def group(blocks: int, slots: int = 4, rounds: int = 2, ahead: int = 1, width: int = 1, block_size: int = 2) -> Group:
    return Group(0, (0, 1), Limits(slots, block_size, width, rounds, ahead), BlockPool(blocks))


def test_nothing_to_do() -> None:
    assert group(4).plan(deque(), 1) is None
    assert group(4).idle


@pytest.mark.parametrize(("rounds", "ahead", "plans"), [(1, 0, 1), (1, 1, 2), (2, 1, 1), (5, 1, 1)])
def test_how_many_plans_are_under_way(rounds: int, ahead: int, plans: int) -> None:
    one = group(50, rounds=rounds, ahead=ahead)
    waiting = deque([sequence(0, 4, 30)])
    made = 0
    while one.plan(waiting, 1) is not None:
        made += 1
    assert made == plans


def test_blocks_are_reserved_on_top_of_what_rounds_under_way_may_use() -> None:
    one = group(50, rounds=1, ahead=1, width=2, block_size=1)
    waiting = deque([sequence(0, 4, 30)])
    tables = [plan.tables[0] for plan in (one.plan(waiting, 1), one.plan(waiting, 1)) if plan is not None]
    assert [len(table) for table in tables] == [4 + 3, 4 + 3 + 3]


def test_no_more_than_its_share() -> None:
    one = group(50)
    waiting = deque(sequence(i, 2, 2) for i in range(4))
    plan = one.plan(waiting, 2)
    assert plan is not None and [a.index for a in plan.admit] == [0, 1]
    assert [s.index for s in waiting] == [2, 3]


def test_a_cache_that_fits_one_sequence_takes_one_at_a_time() -> None:
    one = group(blocks_for(9, 2))
    waiting = deque([sequence(0, 4, 6), sequence(1, 4, 6)])
    plan = one.plan(waiting, 2)
    assert plan is not None and [a.index for a in plan.admit] == [0]
    one.under_way.clear()
    first = next(iter(one.running.values()))
    first.commit([7] * 6)
    one.retire(first)
    plan = one.plan(waiting, 2)
    assert plan is not None and [a.index for a in plan.admit] == [1]
    assert plan.release == [first.slot] == [plan.admit[0].slot]


def test_the_youngest_makes_room_and_keeps_its_tokens() -> None:
    one = group(blocks=8, rounds=1, ahead=0)
    old, young = sequence(0, 2, 12), sequence(1, 2, 12)
    one.plan(deque([old, young]), 2)
    while one.under_way and young.slot in one.running:
        one.under_way.clear()
        old.commit([5, 5])
        young.commit([6, 6])
        plan = one.plan(deque(), 2)
    assert plan is not None and list(one.running.values()) == [old]
    assert plan.release == [young.slot]
    assert one.returned() == [young] and young.output == [6] * len(young.output) and young.output
    assert one.returned() == [], "it comes back once"


def test_what_was_reserved_and_not_used_is_taken_back_before_anyone_has_to_go() -> None:
    """One sequence has reserved a lease of five rounds and used little; the other needs a block for its next round."""
    one = group(blocks=9, rounds=5, ahead=0, width=0, block_size=1)
    thrifty, other = sequence(0, 1, 20), sequence(1, 1, 20)
    one.running = {0: thrifty, 1: other}
    thrifty.slot, other.slot, one._free_slots = 0, 1, [3, 2]
    thrifty.blocks, other.blocks = one.pool.take(7), one.pool.take(2)
    other.commit([5])
    plan = one.plan(deque(), 2)
    assert plan is not None and plan.release == [] and list(one.running) == [0, 1]
    assert len(thrifty.blocks) >= 2 and len(other.blocks) >= 3
    assert set(plan.tables) == {0, 1}, "both tables changed, so the ranks must hear of both"


def test_a_preempted_sequence_is_not_admitted_while_older_plans_may_still_move_it() -> None:
    one = group(blocks=30, rounds=1, ahead=1)
    young = sequence(1, 2, 12)
    one.plan(deque([sequence(0, 2, 12), young]), 2)
    one._preempt(young)  # the next plan will say so
    assert one.returned() == []
    one.plan(deque(), 2)
    assert one.returned() == []
    one.under_way.popleft()
    assert one.returned() == [young]


def test_one_that_ended_before_it_came_back_is_gone() -> None:
    one = group(blocks=30, rounds=1, ahead=1)
    young = sequence(1, 2, 12)
    one.plan(deque([sequence(0, 2, 12), young]), 2)
    one._preempt(young)
    young.finish("stop")
    one.retire(young)
    one.under_way.clear()
    assert one.returned() == [] and not one.leaving


@pytest.mark.parametrize(("limit", "fits"), [(1, True), (9, True), (10, False)])
def test_can_ever_hold(limit: int, fits: bool) -> None:
    """The last token is never computed: 9 tokens take 8 cells."""
    assert group(blocks=4).can_ever_hold(limit) == fits
