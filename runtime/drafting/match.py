"""Finding the longest earlier occurrence of the latest tokens, and copying what followed it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens

CANDIDATES = 32  # how many earlier places are compared; the latest are the likeliest to go on the same way


class MatchIndex:
    """All places of a text at which its `shortest`-grams occur, as chains from the latest back (as in LZ77 coders).

    Eight bytes a token and one dictionary entry for every distinct gram; a look-up compares at most CANDIDATES places.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.tokens = array("i")
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[tuple[int, ...], int] = {}  # gram -> where its latest occurrence ends
        self._before = array("i")  # end of an occurrence -> end of the one before, 0 for none
        self._indexed = 0  # ends up to this one are in the chains

    def extend(self, tokens: Tokens[int]) -> None:
        """Appends tokens to the text. A place becomes findable once a token follows it."""
        self.tokens.extend(tokens)
        self._before.extend([0] * (len(self.tokens) - len(self._before)))
        for end in range(max(self._indexed + 1, self._shortest), len(self.tokens)):
            gram = tuple(self.tokens[end - self._shortest : end])
            self._before[end] = self._latest.get(gram, 0)
            self._latest[gram] = end
        self._indexed = max(self._indexed, len(self.tokens) - 1)

    def truncate(self, length: int) -> None:
        """Takes back all tokens but the first `length`, as if they had never come."""
        for end in range(self._indexed, max(length, self._shortest) - 1, -1):
            gram = tuple(self.tokens[end - self._shortest : end])
            if self._before[end]:
                self._latest[gram] = self._before[end]
            else:
                del self._latest[gram]
        del self.tokens[length:], self._before[length:]
        self._indexed = min(self._indexed, max(0, length - 1))

    def find(self, context: Tokens[int]) -> tuple[int, int]:
        """(end, length) of the longest match of the context's last tokens, the latest of equals; (0, 0) for none."""
        if len(context) < self._shortest:
            return 0, 0
        end = self._latest.get(tuple(context[-self._shortest :]), 0)
        best, best_length = 0, 0
        for _ in range(CANDIDATES):
            if end == 0 or best_length == self._longest:
                break
            length = self._shortest
            most = min(self._longest, end, len(context))
            while length < most and self.tokens[end - length - 1] == context[-length - 1]:
                length += 1
            if length > best_length:
                best, best_length = end, length
            end = self._before[end]
        return best, best_length

    def copy(self, end: int, count: int) -> list[int]:
        """`count` tokens from `end` on; at the text's end it goes on with what it has copied, as a repetition would."""
        following = self.tokens[end : end + count].tolist()
        return [following[i % len(following)] for i in range(count)]
