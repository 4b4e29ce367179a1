"""One rank's rounds: draft, verify, decide, commit or roll back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.batch import Batch, Piece
from runtime.check import Check, Rows
from runtime.clock import Clock
from runtime.comm import Communicator
from runtime.drafting.drafter import Draft, Drafter
from runtime.grammar import Grammars
from runtime.kv_cache import KVCache
from runtime.logprobs import Logprobs
from runtime.model import Model
from runtime.resident import Resident
from runtime.sampling import Choice, choose
from runtime.scheduler import Work, schedule
from runtime.sequence import Sequence
from runtime.verify import Decision, Ints, decide, merge


@dataclass(frozen=True, slots=True)
class Round:
    """A round before its decision. slots, num_drafts: int32 [S]; decides: bool [S]; drafts: int32 [sum of num_drafts]; sources:
    int32 [S], where they come from, -1 for a sequence that may have none."""

    works: list[Work]
    slots: Ints
    decides: NDArray[np.bool_]
    num_drafts: Ints
    drafts: Ints
    sources: Ints

    @property
    def rows(self) -> int:
        """Tokens that the target computes; 0 where some of them are a prompt's, which cost less than those that decide."""
        whole = all(work.decides and work.count == 1 for work in self.works)
        return len(self.works) + len(self.drafts) if whole else 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to; logprobs of the rows that asked. sources, rows: as of a round. last: no round follows, of those
    that were wanted."""

    decision: Decision
    logprobs: Logprobs | None
    sources: Ints
    rows: int
    last: bool


Made = tuple[Decision, Logprobs | None, Ints, int]


class Engine:
    """Holds a rank's sequences and runs rounds over them, in step with the other ranks of its group.

    Every rank calls the same methods in the same order; what they compute differs only in the slice of the model.
    budget: tokens a round computes at most. grammars: of the target's vocabulary.
    """

    def __init__(
        self, model: Model, cache: KVCache, comm: Communicator, drafter: Drafter, budget: int, clock: Clock,
        grammars: Grammars, resident: Resident | None = None,
    ) -> None:  # fmt: skip
        self.clock = clock
        self.sequences: dict[int, Sequence] = {}  # by slot, in order of admission
        self._model = model
        self._cache = cache
        self._comm = comm
        self.drafter = drafter
        self._budget = budget
        self._grammars = grammars
        self._resident = resident

    def admit(self, sequence: Sequence) -> None:
        """Takes up a sequence. Raises GrammarError where its grammar cannot be compiled."""
        if sequence.sampling.grammar is not None and sequence.guide is None:
            sequence.guide = self._grammars.guide(sequence.sampling.grammar)
        self.sequences[sequence.slot] = sequence

    def release(self, slot: int) -> None:
        self.drafter.release(self.sequences.pop(slot))

    def rounds(self, count: int) -> Iterator[Outcome]:
        """Runs up to `count` rounds within the group; ends early when no sequence has work left. Raises what rounds raise."""
        while count:
            if self._resident is not None and self._resident.fits(self.sequences.values()):
                made = self._on_device(self._resident, count)
            else:
                made = self._on_host()
            for decision, logprobs, sources, rows in made:
                count -= 1
                last = count == 0 or not len(decision.slots)
                yield Outcome(decision, logprobs, sources, rows, last)
                if last:
                    return

    def _on_host(self) -> Iterator[Made]:
        round_ = self.draft()
        choice = self.verify(round_)
        decision = self.agree(round_, choice)
        self.apply(round_, decision)
        yield decision, choice.logprobs, round_.sources, round_.rows

    def _on_device(self, resident: Resident, count: int) -> Iterator[Made]:
        with self.clock.part("draft"):
            resident.begin(self.sequences.values(), count)
        launched = min(count, resident.ahead)
        with self.clock.part("forward"):
            for _ in range(launched):
                resident.launch()
        decisions = resident.decisions()
        for _ in range(count):
            with self.clock.part("forward"):
                decision, sources = next(decisions)
            for slot, tokens in zip(decision.slots.tolist(), decision.each(), strict=True):
                self.sequences[slot].commit(tokens)
            stuck = resident.stuck(self.sequences.values())
            if launched < count and not stuck:
                launched += 1
                with self.clock.part("forward"):  # whatever the host looks up meanwhile: a round is under way
                    resident.again()
                    resident.launch()
            yield decision, None, sources, resident.rows
            if stuck:
                return

    def draft(self) -> Round:
        """Schedules the next round and drafts for it."""
        works = schedule(self.sequences.values(), self._budget, self._cache.block_size)
        with self.clock.part("draft"):
            proposed = iter(self.drafter.propose([work for work in works if work.num_drafts > 0]))
        made = [next(proposed) if work.num_drafts > 0 else Draft([], -1) for work in works]
        drafts = [self._cut(work.sequence, draft.tokens) for work, draft in zip(works, made, strict=True)]
        return Round(
            works,
            np.array([work.sequence.slot for work in works], np.int32),
            np.array([work.decides for work in works], np.bool_),
            np.array([len(draft) for draft in drafts], np.int32),
            np.array([token for draft in drafts for token in draft], np.int32),
            np.array([draft.source for draft in made], np.int32),
        )

    def _cut(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """A draft up to the first id that the target has no embedding for or that the sequence's grammar forbids."""
        known = list(takewhile(lambda token: 0 <= token < self._model.vocab_size, draft))
        return known if sequence.guide is None else known[: sequence.guide.stand(sequence.output, known)]

    def verify(self, round_: Round) -> Choice:
        """Runs the target over the round's rows, and chooses within this rank's slice of the vocabulary."""
        if not round_.works:
            return Choice(np.zeros(0, np.float32), np.zeros(0, np.int32))
        drafts = np.split(round_.drafts, np.cumsum(round_.num_drafts)[:-1])
        checks = [check(work, draft.tolist()) for work, draft in zip(round_.works, drafts, strict=True)]
        pieces = [
            Piece(
                work.sequence.tokens[work.start : work.start + work.count] + one.drafts,
                work.start,
                work.sequence.blocks,
                one.count,
            )
            for work, one in zip(round_.works, checks, strict=True)
        ]
        with self.clock.part("forward"):
            batch = Batch.build(pieces, self._cache.block_size, self._cache.device)
            rows = Rows.of(checks)
            if rows.plain:
                return Choice.of(*self._model.best(batch, self._cache, *rows.tensors(self._cache.device)))
            logits = self._model.forward(batch, self._cache)
        with self.clock.part("decide"):
            return choose(logits, checks, self._comm, self._model.vocab_first)

    def agree(self, round_: Round, choice: Choice) -> Decision:
        """Exchanges the pairs within the group and decides, the same on every rank."""
        pairs = np.stack([choice.scores.view(np.int32), choice.ids])
        with self.clock.part("exchange"):
            gathered: Ints = self._comm.all_gather(torch.from_numpy(pairs).to(self._cache.device)).cpu().numpy()
        with self.clock.part("decide"):
            targets = merge(gathered[:, 0].view(np.float32), gathered[:, 1])
            return decide(round_.slots, round_.decides, round_.num_drafts, round_.drafts, targets)

    def apply(self, round_: Round, decision: Decision) -> None:
        """Commits what was decided; drafts that did not stand are rolled back by not being counted as computed."""
        for work, tokens in zip(round_.works, decision.each(), strict=True):
            if tokens:
                work.sequence.commit(tokens)
            else:
                work.sequence.num_computed += work.count


def check(work: Work, drafts: list[int]) -> Check:
    """The rows of logits that a work needs: those that decide, and the prompt's where a request wants to know.

    A sequence that has output was through with its prompt before it was put back; it isn't asked again.
    """
    sequence = work.sequence
    if sequence.sampling.prompt_logprobs is not None and sequence.num_committed == sequence.num_prompt:
        return Check(sequence, work.start + 1, work.count + len(drafts), drafts)
    return Check(sequence, sequence.num_committed, len(drafts) + 1 if work.decides else 0, drafts)
