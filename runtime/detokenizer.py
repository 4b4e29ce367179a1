"""Text out of tokens while they come, to find stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

Decode = Callable[[list[int]], str]

BROKEN = "\ufffd"  # what a decoder makes of the first bytes of a character whose rest has not come


def whole_text(decode: Decode, tokens: list[int]) -> str:
    """The text of a finished output; a character that the last tokens only began is left out, as in vLLM."""
    return decode(tokens).rstrip(BROKEN)


def offsets(decode: Decode, tokens: Iterable[int]) -> list[int]:
    """For every token, the number of characters before it; those of one character share its place."""
    stream = TextStream(decode)
    before, found = 0, []
    for token in tokens:
        found.append(before)
        before = len(stream.push(token))
    return found


class TextStream:
    """The text of tokens that come one by one.

    Only a short tail is decoded at each token: text is settled up to `_settled` tokens, and the decoder gets the settled
    stretch before it for the sake of what depends on neighbours (leading spaces, bytes of one character).
    """

    def __init__(self, decode: Decode) -> None:
        self.settled = ""  # text that no further token changes
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0
        self._settled = 0
        self._whole = ""

    def push(self, token: int) -> str:
        """All text with this token's, up to the last whole character."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._context : self._settled])
        tail = self._decode(self._tokens[self._context :])
        if len(tail) <= len(known):
            return self._whole
        text = self.settled + tail[len(known) :]
        if not tail.endswith(BROKEN):
            self.settled = text
            self._context, self._settled = self._settled, len(self._tokens)
        # Whole characters may come together with the first bytes of the next, whose end may never come.
        self._whole = text.rstrip(BROKEN)
        return self._whole


class Stopped(NamedTuple):
    """A stop string has come: the text that is left, and which it was."""

    text: str
    stop: str


class StopWatch:
    """Follows one sequence's output and says when a stop string has appeared.

    Tokens are looked at one by one, so where it stops does not depend on how many were decided at once. `include` keeps
    the stop string in the text; one that is complete within the first `min_tokens` tokens does not count.
    """

    def __init__(self, decode: Decode, stops: tuple[str, ...], include: bool = False, min_tokens: int = 0) -> None:
        self._stream = TextStream(decode)
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._exempt = min_tokens  # tokens yet to come in which no stop counts
        self._floor = 0  # characters of those that came

    def push(self, token: int) -> Stopped | None:
        """What the first stop string leaves, as soon as this token completes one; None as long as none has come."""
        if not self._stops:
            return None
        start = max(0, len(self._stream.settled) - self._longest + 1)
        text = self._stream.push(token)
        if self._exempt > 0:
            self._exempt -= 1
            self._floor = len(text)
            return None
        found = [
            (at, stop)
            for stop in self._stops
            if (at := text.find(stop, max(start, self._floor - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found, key=lambda pair: pair[0])
        return Stopped(text[: at + len(stop) if self._include else at], stop)
