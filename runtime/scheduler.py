"""What one round computes: a pure function of the running sequences, the same on every rank.

There is no prefill phase and no decode phase. A sequence's work is what lies between `num_computed` and
`num_committed`, and once that reaches the end, drafts on top of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a round: `count` committed tokens from `start` on, then up to `num_drafts` drafts.

    `num_drafts` is what there is room for, of the largest of the sequence's allowances. `decides` is true where the
    committed tokens are reached, so that the round decides at least one new token.
    """

    sequence: Sequence
    start: int
    count: int
    num_drafts: int
    decides: bool

    def most(self, source: int) -> int:
        """Drafts that this source may propose."""
        return min(self.num_drafts, self.sequence.allowance[source - 1])


def schedule(sequences: Iterable[Sequence], budget: int, block_size: int) -> list[Work]:
    """The works of the next round, in the order in which the sequences were admitted.

    Every sequence that only needs its next token gets that one first, so that a long prompt never holds up the others;
    what is left of `budget` (tokens) goes to pending tokens in order of admission, then to drafts, within their allowances.
    No sequence is taken beyond its blocks, nor drafted beyond its limit. A sequence for which nothing is left has no work.
    """
    ready = [s for s in sequences if s.finish_reason is None]
    room = {s.slot: len(s.blocks) * block_size - s.num_computed for s in ready}
    counts: dict[int, int] = {}
    for sequence in sorted(ready, key=lambda s: s.num_committed - s.num_computed > 1):
        count = min(sequence.num_committed - sequence.num_computed, budget, room[sequence.slot])
        if count > 0:
            counts[sequence.slot] = count
            budget -= count
    works = []
    for sequence in ready:
        count = counts.get(sequence.slot, 0)
        if count == 0:
            continue
        decides = sequence.num_computed + count == sequence.num_committed
        drafts = 0
        if decides:
            left = sequence.limit - sequence.num_committed - 1
            drafts = max(0, min(max(sequence.allowance, default=0), left, budget, room[sequence.slot] - count))
            budget -= drafts
        works.append(Work(sequence, sequence.num_computed, count, drafts, decides))
    return works
