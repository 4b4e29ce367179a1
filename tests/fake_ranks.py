"""Ranks in plain Python: the real sequences, scheduler and rules of a round, with an invented model in place of tensors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.costs import Costs, Effort
from runtime.engine import check
from runtime.logprobs import Logprobs
from runtime.messages import Hello, Plan, Report, Verdict
from runtime.scheduler import Work, schedule
from runtime.sequence import Sequence
from runtime.verify import Decision, Ints, decide
from workers.rank import admit

VOCAB = 11
Target = Callable[[int, int, int], int]  # (request, copy, position) -> token: what the invented model always answers


def invented_token(seed: int, request: int, copy: int, position: int) -> int:
    """A pure function with few values, so that random drafts often stand."""
    return random.Random(f"{seed} {request} {copy} {position}").randrange(1, VOCAB)


@dataclass(slots=True)
class Cache:
    """Remembers which token each cell of a rank's paged cache was computed for, to catch blocks that the wrong ones share.

    A cell of a prompt may have been computed for any copy of it, and is nobody's to write while two hold it.
    """

    block_size: int
    cells: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    written: int = 0  # cells of prompts

    def write(self, sequence: Sequence, position: int, token: int) -> None:
        block = sequence.blocks[position // self.block_size]
        assert self.holders[block] == 1, "a shared block is written"
        self.cells[block, position % self.block_size] = self.content(sequence, position, token)
        self.written += position < sequence.num_prompt

    def content(self, sequence: Sequence, position: int, token: int) -> tuple[int, int, int, int]:
        return sequence.index, -1 if position < sequence.num_prompt else sequence.copy, position, token

    def check(self, sequence: Sequence, upto: int) -> None:
        """All cells before `upto` must still hold what this sequence's committed tokens put there."""
        for position in range(upto):
            cell = sequence.blocks[position // self.block_size], position % self.block_size
            expected = self.content(sequence, position, sequence.tokens[position])
            assert self.cells.get(cell) == expected, f"cell {cell} holds {self.cells.get(cell)}, not {expected}"


@dataclass(slots=True)
class FakeGroup:
    """One tensor-parallel group. Its ranks hold the same, so one state stands for all; each sends its own messages.

    draft_rng: where the drafts come from; a draft token is right with chance `accuracy`. lookups: their kinds of sources.
    costs: said to be what rounds take, or nothing, where numbers of drafts are fixed; in truth they take anything.
    """

    number: int
    ranks: tuple[int, ...]
    merge: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    lookups: int
    budget: int
    target: Target
    costs: Costs | None
    draft_rng: random.Random
    accuracy: float = 0.6
    sequences: dict[int, Sequence] = field(default_factory=dict)
    cache: Cache = field(init=False)
    digest: bytes = b""
    plans: int = 0
    preempted: int = 0  # admissions of sequences that already had output
    borrowed: int = 0  # admissions behind blocks that another copy computed
    works: list[Work] = field(default_factory=list)
    num_drafts: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    sources: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    allowances: set[tuple[int, ...]] = field(default_factory=set)  # that sequences had
    logprobs: Logprobs | None = None

    def __post_init__(self) -> None:
        self.cache = Cache(self.block_size)

    def hellos(self, max_model_len: int = 1000, end_tokens: tuple[int, ...] = ()) -> list[Hello]:
        return [
            Hello(
                rank, self.number, "same", self.num_blocks, max_model_len, VOCAB, list(end_tokens),
                lookups=self.lookups, costs=self.costs,
            )
            for rank in self.ranks
        ]  # fmt: skip

    def carry_out(self, plan: Plan) -> list[list[Report] | list[Verdict]]:
        """What the ranks send, by rank, in the order of sending."""
        self.plans += 1
        assert plan.number == self.plans, "plans must come in order, none twice"
        if plan.decision is not None:
            self.apply(plan.decision)
        for slot in plan.release:
            del self.sequences[slot]
        for newcomer in plan.admit:
            assert newcomer.slot not in self.sequences, f"slot {newcomer.slot} is taken"
            self.sequences[newcomer.slot] = admit(newcomer)
            self.preempted += len(newcomer.tokens) > newcomer.num_prompt
            self.borrowed += newcomer.num_computed > 0
        for slot, blocks in plan.tables.items():
            self.sequences[slot].blocks = blocks
        for slot, allowance in plan.allowances.items():
            assert len(allowance) == self.lookups
            self.sequences[slot].allowance = allowance
        self.allowances.update(tuple(sequence.allowance) for sequence in self.sequences.values())
        self.check_tables()
        return self.vote(plan) if self.merge == "coordinator" else self.decide(plan)

    def check_tables(self) -> None:
        held = [block for sequence in self.sequences.values() for block in sequence.blocks]
        self.cache.holders = Counter(held)
        owners: dict[int, tuple[int, int]] = {}
        for sequence in self.sequences.values():
            own = (sequence.num_prompt - 1) // self.block_size
            assert len(sequence.blocks) == len(set(sequence.blocks))
            for place, block in enumerate(sequence.blocks):
                if self.cache.holders[block] > 1:
                    assert place < own, "what is not wholly prompt has two owners"
                    assert owners.setdefault(block, (sequence.index, place)) == (sequence.index, place)
        assert all(0 <= block < self.num_blocks for block in held)
        assert len(self.sequences) <= self.max_num_seqs and all(0 <= s < self.max_num_seqs for s in self.sequences)

    def draft(self) -> tuple[Ints, np.ndarray, Ints, Ints, Ints]:
        """Schedules, drafts, writes the cache. Returns slots, decides, num_drafts, drafts, and the targets of all rows."""
        self.works = schedule(self.sequences.values(), self.budget, self.block_size)
        drafts, counts, targets, sources = [], [], [], []
        told: list[tuple[int, int, int]] = []
        for work in self.works:
            sequence = work.sequence
            self.cache.check(sequence, work.start)
            for position in range(work.start, work.start + work.count):
                self.cache.write(sequence, position, sequence.tokens[position])
            right = [self.target(sequence.index, sequence.copy, sequence.num_committed + i) for i in range(work.num_drafts + 1)]
            source = self.draft_rng.randint(0, self.lookups) if work.num_drafts else -1
            sources.append(source)
            count = self.draft_rng.randint(0, work.most(source)) if source > 0 else 0
            proposed = [token if self.draft_rng.random() < self.accuracy else 0 for token in right[:count]]
            for i, token in enumerate(proposed):
                self.cache.write(sequence, sequence.num_committed + i, token)
            drafts += proposed
            counts.append(len(proposed))
            targets += right[: len(proposed) + 1] if work.decides else []
            told += told_tokens(work, proposed, right)
        self.logprobs = logprobs_of(told)
        self.num_drafts, self.sources = np.array(counts, np.int32), np.array(sources, np.int32)
        slots = np.array([work.sequence.slot for work in self.works], np.int32)
        decides = np.array([work.decides for work in self.works], bool)
        return slots, decides, self.num_drafts, np.array(drafts, np.int32), np.array(targets, np.int32)

    def apply(self, decision: Decision) -> None:
        offset = 0
        for work, num_tokens in zip(self.works, decision.num_tokens.tolist(), strict=True):
            if num_tokens == 0:
                work.sequence.num_computed += work.count
            else:
                work.sequence.commit(decision.tokens[offset : offset + num_tokens].tolist())
                offset += num_tokens

    def decide(self, plan: Plan) -> list[list[Report] | list[Verdict]]:
        sent: list[list[Report]] = [[] for _ in self.ranks]
        for left in reversed(range(plan.rounds)):
            decision = decide(*self.draft())
            logprobs = self.logprobs
            self.apply(decision)
            self.digest = decision.digest(self.digest)
            last = left == 0 or not self.works
            for i, rank in enumerate(self.ranks):
                answer = (decision, logprobs) if i == 0 else (None, None)
                sent[i].append(Report(rank, plan.number, self.digest, last, *answer, self.sources, self.effort()))
            if last:
                break
        return list(sent)

    def vote(self, plan: Plan) -> list[list[Report] | list[Verdict]]:
        """One verdict per rank; each sees a part of the vocabulary, and the winner of a row lies with one of them."""
        slots, decides, num_drafts, drafts, targets = self.draft()
        sent: list[list[Report] | list[Verdict]] = []
        for i, rank in enumerate(self.ranks):
            mine = targets % len(self.ranks) == i
            scores = np.where(mine, 1.0, -1.0).astype(np.float32)
            ids = np.where(mine, targets, i).astype(np.int32)
            told = self.logprobs if i == 0 else None
            votes = decides.astype(np.int32), num_drafts, drafts, scores, ids, told, self.sources, self.effort()
            sent.append([Verdict(rank, plan.number, slots, *votes)])
        return sent

    def effort(self) -> Effort:
        """Of the round just run, in a machine whose speed is anybody's guess."""
        rows = self.draft_rng.randint(0, 30)
        return Effort(self.draft_rng.choice([0.0, 1e-6, 0.01, self.draft_rng.random(), 1e3]), 0.0, rows)


def told_tokens(work: Work, drafts: list[int], right: list[int]) -> list[tuple[int, int, int]]:
    """(slot, position, token) of the rows of a work whose log-probabilities are wanted."""
    sequence, rows = work.sequence, check(work, drafts)
    tokens = [*sequence.tokens, *right]
    wanted = range(rows.position, rows.position + rows.count)
    return [
        (sequence.slot, position, tokens[position])
        for position in wanted
        if position < sequence.num_committed or sequence.sampling.logprobs is not None
    ]


def logprobs_of(told: list[tuple[int, int, int]]) -> Logprobs | None:
    """Log-probabilities that say which position they are of."""
    slots, positions, tokens = (np.array(column, np.int32) for column in (zip(*told, strict=True) if told else [()] * 3))
    none = np.zeros(0, np.int32)
    values = -positions.astype(np.float32)
    return Logprobs(slots, positions, tokens, np.zeros(len(told), np.int32), values, none, values[:0]) if told else None
