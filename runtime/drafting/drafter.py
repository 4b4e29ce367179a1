"""What proposes tokens, and the two that look for them in text that is already there."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Protocol

from runtime.drafting.match import MatchIndex
from runtime.scheduler import Work
from runtime.sequence import Sequence

REMEMBERED = 2**22  # tokens of finished sequences that the suffix drafter keeps at least, and twice that at most


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens and where they come from, one of the drafter's sources; 0 if nothing was found.

    A source may have found something and have no tokens, where none are allowed of it.
    """

    tokens: list[int]
    source: int


class Drafter(Protocol):
    """Proposes tokens for the sequences it is asked about; whatever it proposes, the output is the same.

    A draft has one of several sources, which differ in how likely their drafts stand: first `lookups` kinds of matches, then,
    if it `chains`, a model, which always has something to say. Numbers of drafts are allowed by source.
    """

    lookups: int
    chains: bool

    def propose(self, works: list[Work]) -> list[Draft]:
        """A draft for each work, to follow its sequence's committed tokens, of at most `work.most(source)` tokens.

        All ranks of a group call it with the same works, none of which has no room for drafts. A draft ends at the first
        id that is no token of the target's.
        """

    def rewind(self, sequence: Sequence) -> None:
        """Tokens were taken back that it was asked about: the sequence's committed ones are all that still hold."""

    def release(self, sequence: Sequence) -> None:
        """The sequence left its slot: finished, or put back to be computed again later."""


class NoDrafter:
    """Proposes nothing: plain decoding."""

    lookups, chains = 0, False

    def propose(self, works: list[Work]) -> list[Draft]:
        return [Draft([], 0) for _ in works]

    def rewind(self, sequence: Sequence) -> None:
        pass

    def release(self, sequence: Sequence) -> None:
        pass


class NgramDrafter:
    """Prompt lookup (Saxena, 2023): what followed the latest, longest earlier occurrence of a sequence's last tokens.

    The source of a draft is the length of its match.
    """

    chains = False

    def __init__(self, shortest: int, longest: int) -> None:
        self.lookups = longest
        self._shortest = shortest
        self._longest = longest
        self._own: dict[int, MatchIndex] = {}

    def propose(self, works: list[Work]) -> list[Draft]:
        drafts = []
        for work in works:
            index = self._index(work.sequence)
            end, length = index.find(index.tokens)
            drafts.append(Draft(index.copy(end, work.most(length)), length) if length else Draft([], 0))
        return drafts

    def rewind(self, sequence: Sequence) -> None:
        if sequence.slot in self._own:
            self._own[sequence.slot].truncate(sequence.num_committed)

    def release(self, sequence: Sequence) -> None:
        self._own.pop(sequence.slot, None)

    def _index(self, sequence: Sequence) -> MatchIndex:
        """The sequence's own index, brought up to its committed tokens."""
        index = self._own.setdefault(sequence.slot, MatchIndex(self._shortest, self._longest))
        index.extend(sequence.tokens[len(index.tokens) :])
        return index


class SuffixDrafter(NgramDrafter):
    """Prompt lookup in the sequence itself and in everything this job has finished (SuffixDecoding's idea, Oliaro 2024).

    The longer match wins of those that drafts are allowed of, the sequence's own on ties. The source is the length of the
    match, plus `longest` if it is not the sequence's own. Memory is bounded by two generations of finished text: when the
    younger is full, the older is forgotten.
    """

    def __init__(self, shortest: int, longest: int, remembered: int = REMEMBERED) -> None:
        super().__init__(shortest, longest)
        self.lookups = 2 * longest
        self._longest = longest
        self._remembered = remembered
        self._generations = [MatchIndex(shortest, longest)]

    def propose(self, works: list[Work]) -> list[Draft]:
        drafts = []
        for work in works:
            own = self._index(work.sequence)
            context: array[int] = own.tokens
            best, match = (False, 0, 0), (own, 0)
            for index in (own, *self._generations):
                end, length = index.find(context)
                source = length if index is own else self._longest + length
                if length and (better := (work.most(source) > 0, length, source))[:2] > best[:2]:
                    best, match = better, (index, end)
            drafts.append(Draft(match[0].copy(match[1], work.most(best[2])), best[2]) if best[2] else Draft([], 0))
        return drafts

    def recall(self, context: list[int], count: int) -> tuple[int, list[int]]:
        """The length of the longest match of a text's last tokens in what the job has finished, and `count` tokens from there
        on; 0 and none if there is no match."""
        found = [(index, *index.find(context)) for index in self._generations]
        index, end, length = max(found, key=lambda place: place[2])
        return length, index.copy(end, count) if length else []

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        if len(self._generations[0].tokens) >= self._remembered:
            self._generations = [MatchIndex(self._shortest, self._longest), self._generations[0]]
        self._generations[0].extend([*sequence.tokens, -1])  # -1 is no token: matches end at the seam
