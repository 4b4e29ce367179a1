"""One tensor-parallel group as the coordinator sees it: its slots, its cache blocks, its plans under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from configs.schema import RunConfig
from runtime.blocks import BlockPool, blocks_for
from runtime.messages import Admission, Plan, Report, Verdict
from runtime.sequence import Sequence
from runtime.tuner import Tuner
from runtime.verify import Decision


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group's plans are made within.

    width: most drafts per sequence and round. rounds: of a plan. ahead: rounds that may still be under way when the next
    plan is sent; 0 where a plan needs the decision of the one before. fixed: whether every draft of `width` is to be had, or
    as many as pay.
    """

    max_num_seqs: int
    block_size: int
    width: int
    rounds: int
    ahead: int
    fixed: bool = True

    @classmethod
    def of(cls, config: RunConfig) -> Limits:
        """A lease of rounds with the next one sent ahead, or a round at a time."""
        in_group = config.coordination.merge == "group"
        lease = config.coordination.lease or (1 if config.certified else 4)
        return cls(
            max_num_seqs=config.engine.max_num_seqs,
            block_size=config.engine.block_size,
            width=config.width,
            rounds=lease if in_group else 1,
            ahead=1 if in_group else 0,
            fixed=not config.varied,
        )


@dataclass(slots=True)
class UnderWay:
    """A plan that ranks are working on. `sequences` are the slots as they were when it was made, `growth` the most tokens that
    one of its rounds may add to each."""

    number: int
    rounds_left: int
    sequences: dict[int, Sequence]
    growth: dict[int, int]


@dataclass(slots=True)
class Group:
    """Makes the plans of one group, and keeps every block accounted for.

    Ranks carry out plans in order, and each releases before it admits. So what a finished sequence held may be handed
    on in the very next plan, even while an earlier one is still under way.
    """

    number: int
    ranks: tuple[int, ...]
    limits: Limits
    pool: BlockPool
    sources: int = 1  # of drafts
    tuner: Tuner | None = None
    running: dict[int, Sequence] = field(default_factory=dict)  # by slot, in order of admission
    under_way: deque[UnderWay] = field(default_factory=deque)
    reports: dict[int, deque[Report]] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    decision: Decision | None = None  # merged here, not yet told to the ranks
    leaving: list[tuple[int, Sequence]] = field(default_factory=list)  # preempted by the plan of this number
    kept: dict[int, list[int]] = field(default_factory=dict)  # index -> a prompt's blocks, for copies yet to come
    plans: int = 0
    _free_slots: list[int] = field(default_factory=list)
    _release: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.limits.max_num_seqs - 1, -1, -1))
        self.reports = {rank: deque() for rank in self.ranks}

    @property
    def rounds_under_way(self) -> int:
        return sum(plan.rounds_left for plan in self.under_way)

    @property
    def idle(self) -> bool:
        return not (self.running or self.under_way or self.leaving)

    def can_ever_hold(self, limit: int) -> bool:
        """Whether a sequence that may grow to `limit` tokens fits into the whole cache."""
        return blocks_for(max(1, limit - 1), self.limits.block_size) <= self.pool.size

    def retire(self, sequence: Sequence, heirs: bool = False) -> None:
        """Takes a finished or preempted sequence off its slot; the ranks hear of it with the next plan.

        `heirs`: copies of its prompt are waiting, for whose sake the prompt's blocks are kept.
        """
        if self.running.get(sequence.slot) is not sequence:
            return  # preempted before it finished
        del self.running[sequence.slot]
        if heirs and sequence.index not in self.kept and self._has_prompt(sequence):
            self.kept[sequence.index] = self.pool.share(sequence.blocks[: self._shareable(sequence)])
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        self._release.append(sequence.slot)
        self._free_slots.append(sequence.slot)

    def returned(self) -> list[Sequence]:
        """Preempted sequences about which nothing is under way any more: they may be admitted again."""
        oldest = self.under_way[0].number if self.under_way else self.plans + 1
        back = [s for number, s in self.leaving if number <= oldest]
        self.leaving = [(number, s) for number, s in self.leaving if number > oldest]
        return [s for s in back if s.finish_reason is None]

    def plan(self, waiting: deque[Sequence], share: int) -> Plan | None:
        """The next plan, or None if there is nothing to do or enough is under way.

        Takes sequences off the front of `waiting` while fewer than `share` run here and they fit.
        """
        self._forget({sequence.index for sequence in waiting})
        if self.rounds_under_way > self.limits.ahead:
            return None
        before = {slot: (list(s.blocks), s.allowance) for slot, s in self.running.items()}
        allowance = self._allow(max(0, min(len(self._free_slots), share - len(self.running), len(waiting))))
        for sequence in list(self.running.values()):
            if self.running.get(sequence.slot) is sequence:
                self._reserve(sequence)
        changed = [s for slot, s in self.running.items() if s.blocks != before[slot][0]]
        allowed = [s for slot, s in self.running.items() if s.allowance != before[slot][1]]
        admitted = self._admit(waiting, share, allowance)
        if not self.running:
            return None
        self.plans += 1
        plan = Plan(
            number=self.plans,
            rounds=self.limits.rounds,
            decision=self.decision,
            release=self._release,
            admit=[admission(s) for s in admitted],
            tables={s.slot: list(s.blocks) for s in changed + admitted},
            allowances={s.slot: s.allowance for s in allowed + admitted},
        )
        self.decision, self._release = None, []
        growth = {slot: growth_of(s) for slot, s in self.running.items()}
        self.under_way.append(UnderWay(plan.number, plan.rounds, dict(self.running), growth))
        return plan

    def _allow(self, coming: int) -> list[int]:
        """Says how many drafts each sequence may have in the next plan; returns what so many newcomers may have."""
        running = list(self.running.values())
        *chosen, newcomers = [[self.limits.width] * self.sources] * (len(running) + 1)
        if self.tuner is not None and len(running) + coming:
            *chosen, newcomers = self.tuner.choose(running, coming)
        for sequence, allowance in zip(running, chosen, strict=True):
            sequence.allowance = allowance
        return newcomers

    def _reach(self, sequence: Sequence, rounds: int) -> int:
        """Tokens whose keys and values these many rounds, on top of those under way, may write at most."""
        growth = rounds * growth_of(sequence)
        concerned = [plan for plan in self.under_way if plan.sequences.get(sequence.slot) is sequence]
        growth += sum(plan.rounds_left * plan.growth[sequence.slot] for plan in concerned)
        return max(1, min(sequence.limit - 1, sequence.num_committed + growth))

    def _reserve(self, sequence: Sequence) -> None:
        """Blocks for a whole plan if they can be had; for one round in any case, at the cost of the youngest."""
        if self._grow(sequence, self._reach(sequence, self.limits.rounds)):
            return
        self._forget(set())
        self._reclaim()
        while not self._grow(sequence, self._reach(sequence, 1)):
            youngest = next(reversed(self.running.values()))
            self._preempt(youngest)
            if youngest is sequence:
                return
        missing = self._missing(sequence, self._reach(sequence, self.limits.rounds))
        sequence.blocks += self.pool.take(min(missing, self.pool.num_free))

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        return max(0, blocks_for(tokens, self.limits.block_size) - len(sequence.blocks))

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Takes blocks until the sequence can hold this many tokens; whether that worked."""
        missing = self._missing(sequence, tokens)
        if missing > self.pool.num_free:
            return False
        sequence.blocks += self.pool.take(missing)
        return True

    def _reclaim(self) -> None:
        """Takes back what plans reserved beyond one round and did not use."""
        for sequence in self.running.values():
            keep = blocks_for(self._reach(sequence, 1), self.limits.block_size)
            self.pool.give_back(sequence.blocks[keep:])
            del sequence.blocks[keep:]

    def _preempt(self, sequence: Sequence) -> None:
        """Puts a sequence back: its tokens stay, its cache goes, and it is computed again later."""
        self.retire(sequence)
        self.leaving.append((self.plans + 1, sequence))

    def _admit(self, waiting: deque[Sequence], share: int, allowance: list[int]) -> list[Sequence]:
        admitted: list[Sequence] = []
        passed_over: list[Sequence] = []
        while waiting and self._free_slots and len(self.running) < share:
            sequence = waiting.popleft()
            shared = self._shared(sequence)
            if shared is None:
                passed_over.append(sequence)
                continue
            sequence.allowance = allowance
            need = blocks_for(self._reach(sequence, self.limits.rounds), self.limits.block_size) - len(shared)
            # Room for the others to grow through one more plan, or they would push the newcomer out again at once.
            margin = sum(blocks_for(self.limits.rounds * growth_of(s), self.limits.block_size) for s in self.running.values())
            if need + margin > self.pool.num_free:
                self._forget({sequence.index} if shared else set())
            if need + margin > self.pool.num_free and self.running:
                waiting.appendleft(sequence)
                break
            sequence.slot = self._free_slots.pop()
            if self.tuner is not None:
                self.tuner.acceptance.forget(sequence.slot)
            sequence.num_computed = len(shared) * self.limits.block_size
            sequence.blocks = self.pool.share(shared) + self.pool.take(need)
            self.running[sequence.slot] = sequence
            admitted.append(sequence)
        waiting.extendleft(reversed(passed_over))
        return admitted

    def _shareable(self, sequence: Sequence) -> int:
        """How many of its blocks all copies of a prompt can hold together.

        Those are whole blocks before the prompt's last token: that token is an input of every copy, and everything after
        it is a copy's own. So a shared block is never written again, whatever is drafted or rolled back.
        """
        return (sequence.num_prompt - 1) // self.limits.block_size

    def _has_prompt(self, sequence: Sequence) -> bool:
        """Whether its shareable blocks are computed."""
        return sequence.num_computed >= self._shareable(sequence) * self.limits.block_size

    def _shared(self, sequence: Sequence) -> list[int] | None:
        """The prompt's blocks, if a copy has left or computed them; none without any; None while they are being computed."""
        count = self._shareable(sequence)
        kin = [s for s in self.running.values() if s.index == sequence.index]
        if not count or not sequence.borrows:
            return []
        if sequence.index in self.kept or not kin:
            return self.kept.get(sequence.index, [])
        donor = next(filter(self._has_prompt, kin), None)
        return None if donor is None else donor.blocks[:count]

    def _forget(self, heirs: set[int]) -> None:
        """Gives back what is kept for others than these requests."""
        for index in [index for index in self.kept if index not in heirs]:
            self.pool.give_back(self.kept.pop(index))


def growth_of(sequence: Sequence) -> int:
    """Tokens that one round adds at most."""
    return max(sequence.allowance, default=0) + 1


def admission(sequence: Sequence) -> Admission:
    """What a rank needs to hold the same sequence."""
    return Admission(
        index=sequence.index,
        slot=sequence.slot,
        tokens=list(sequence.tokens),
        num_prompt=sequence.num_prompt,
        limit=sequence.limit,
        ends=sorted(sequence.ends),
        sampling=sequence.sampling,
        copy=sequence.copy,
        num_computed=sequence.num_computed,
        premature=sorted(sequence.premature),
    )
