"""Certified output: a cheap model, with speculation of its own, drafts for the model whose output it is."""

from __future__ import annotations

from dataclasses import replace

from runtime.drafting.drafter import Draft, Drafter
from runtime.engine import Engine
from runtime.request import SpeculationStats
from runtime.scheduler import Work
from runtime.sequence import Sequence
from runtime.verify import Decision


class Cascade:
    """Drafts a window of tokens for each sequence by running rounds of an engine over provisional copies of them.

    engine: of the cheap model, in step with the group's other ranks, on the certifier's own cache: for certified tokens it
    reads the certifier's keys and values, within a window it writes its own, and the check of the window writes over
    them. So nothing is computed twice but the window, and between two windows nothing is kept of a sequence.
    drafter: the engine's; width: its drafts of a round. stats: of its rounds.
    """

    lookups, chains = 0, True

    def __init__(self, engine: Engine, drafter: Drafter, width: int) -> None:
        self._width = width
        self.stats = SpeculationStats()
        self._engine = engine
        self._drafter = drafter

    def propose(self, works: list[Work]) -> list[Draft]:
        allowance = [self._width] * (self._drafter.lookups + self._drafter.chains)
        copies = [provisional(work, allowance) for work in works]
        for copy in copies:
            self._engine.admit(copy)
        while missing := [copy.limit - copy.num_committed for copy in copies if copy.finish_reason is None]:
            for outcome in self._engine.rounds(-(-max(missing) // (self._width + 1))):  # fewer cannot be enough
                self._count(outcome.decision)
        self._engine.sequences.clear()
        for work in works:
            self._drafter.rewind(work.sequence)
        return [Draft(copy.tokens[work.sequence.num_committed :], 1) for copy, work in zip(copies, works, strict=True)]

    def _count(self, decision: Decision) -> None:
        for num_drafts, num_tokens in zip(decision.num_drafts.tolist(), decision.num_tokens.tolist(), strict=True):
            if num_tokens:
                self.stats.count(num_drafts, num_tokens - 1)

    def rewind(self, sequence: Sequence) -> None:
        self._drafter.rewind(sequence)

    def release(self, sequence: Sequence) -> None:
        self._drafter.release(sequence)


def provisional(work: Work, allowance: list[int]) -> Sequence:
    """A copy of a work's sequence that ends where its draft does. Nobody wants to know how likely its tokens are."""
    sequence = work.sequence
    return replace(
        sequence,
        tokens=list(sequence.tokens),
        num_computed=work.start,
        limit=sequence.num_committed + work.num_drafts,
        allowance=allowance,
        sampling=replace(sequence.sampling, logprobs=None, prompt_logprobs=None),
    )
