"""Merging verdicts and deciding: which drafts stand, and the token after them.

Both are host arithmetic on a handful of numbers, the same function whether a group's ranks or the coordinator calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

NOTHING = -1  # in place of a token where none is allowed

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class NotANumber(RuntimeError):
    """A score is NaN, so that nothing can be decided."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """The outcome of a round. slots, num_drafts, num_tokens: int32 [S]; tokens: int32 [sum of num_tokens].

    A sequence whose committed tokens were not reached in this round has `num_tokens` 0; every other has at least one:
    the drafts that stood and the token after them.
    """

    slots: Ints
    num_drafts: Ints
    num_tokens: Ints
    tokens: Ints

    def each(self) -> Iterator[list[int]]:
        """Every sequence's tokens, in order of `slots`."""
        ends = np.cumsum(self.num_tokens).tolist()
        return (self.tokens[end - count : end].tolist() for end, count in zip(ends, self.num_tokens.tolist(), strict=True))

    def digest(self, before: bytes = b"") -> bytes:
        """Eight bytes that two ranks share only if they decided the same, in this round and all before."""
        state = blake2b(before, digest_size=8)
        for array in (self.slots, self.num_drafts, self.num_tokens, self.tokens):
            state.update(len(array).to_bytes(4, "little"))  # or numbers could move from one array to the next
            state.update(array.tobytes())
        return state.digest()


def merge(scores: Floats, ids: Ints) -> Ints:
    """The winning token of every row. scores: float32 [ranks, R]; ids: int32 [ranks, R]. Returns int32 [R].

    The larger score wins, the smaller id on ties: associative and commutative, so no order of arrival matters. A row in
    which no score is above minus infinity has NOTHING. Raises NotANumber.
    """
    if np.isnan(scores).any():
        raise NotANumber("the model's output is not a number (NaN); its weights, or their type's range, are at fault")
    top = scores.max(axis=0)
    winners = np.where(scores == top, ids, np.iinfo(np.int32).max).min(axis=0)
    return np.where(np.isneginf(top), NOTHING, winners).astype(np.int32)


def decide(slots: Ints, decides: NDArray[np.bool_], num_drafts: Ints, drafts: Ints, targets: Ints) -> Decision:
    """Compares drafts with the target's tokens.

    slots, num_drafts: int32 [S]; decides: bool [S]; drafts: int32 [sum of num_drafts]; targets: int32, `num_drafts + 1`
    rows for every sequence that decides and none for the others, in order. A draft stands if it equals the target's token
    at its position and all before it stood; the token after the last that stands is the target's own.
    """
    num_tokens = np.zeros(len(slots), np.int32)
    tokens: list[Ints] = []
    row = draft = 0
    for i, count in enumerate(num_drafts.tolist()):
        if not decides[i]:
            continue
        target = targets[row : row + count + 1]
        wrong = np.flatnonzero(target[:count] != drafts[draft : draft + count])
        stand = int(wrong[0]) if len(wrong) else count
        tokens.append(target[: stand + 1])
        num_tokens[i] = stand + 1
        row += count + 1
        draft += count
    return Decision(slots, num_drafts, num_tokens, np.concatenate(tokens, dtype=np.int32) if tokens else np.zeros(0, np.int32))
