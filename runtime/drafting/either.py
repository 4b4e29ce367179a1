"""Drafting from matches where they are worth it, and with a small model where they aren't."""

from __future__ import annotations

from runtime.drafting.drafter import Draft, SuffixDrafter
from runtime.drafting.model import ModelDrafter
from runtime.scheduler import Work
from runtime.sequence import Sequence


class Either:
    """Asks for a match first, and the model where there is none or where none of its drafts are allowed.

    Whose drafts are worth more is said by the sequence's allowance: a match that is worse than the model has none.
    """

    chains = True

    def __init__(self, lookup: SuffixDrafter, chain: ModelDrafter) -> None:
        self.lookups = lookup.lookups
        self.chain = chain
        self.lookup = lookup

    def propose(self, works: list[Work]) -> list[Draft]:
        drafts = self.lookup.propose(works)
        left = [i for i, draft in enumerate(drafts) if not draft.tokens and works[i].most(self.lookups + 1)]
        for i, draft in zip(left, self.chain.propose([works[i] for i in left]), strict=True):
            drafts[i] = draft
        return drafts

    def rewind(self, sequence: Sequence) -> None:
        self.lookup.rewind(sequence)
        self.chain.rewind(sequence)

    def release(self, sequence: Sequence) -> None:
        self.lookup.release(sequence)
        self.chain.release(sequence)
