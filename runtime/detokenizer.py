"""Text out of tokens while they come, to find stop strings in it."""

from __future__ import annotations

from collections.abc import Callable

_BROKEN = "\ufffd"  # what a decoder makes of the first bytes of a character whose rest has not come


class StopWatch:
    """Follows one sequence's output and says when a stop string has appeared.

    Tokens are looked at one by one, so where it stops does not depend on how many were decided at once. Only a short tail
    is decoded at each token: text is settled up to `_settled` tokens, and the decoder gets the settled stretch before it
    for the sake of what depends on neighbours (leading spaces, bytes of one character).
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._tokens: list[int] = []
        self._context = 0
        self._settled = 0
        self._text = ""

    def push(self, token: int) -> str | None:
        """The text before the first stop string, as soon as this token completes one; None as long as none has come."""
        if not self._stops:
            return None
        self._tokens.append(token)
        known = self._decode(self._tokens[self._context : self._settled])
        tail = self._decode(self._tokens[self._context :])
        if len(tail) <= len(known):
            return None
        search_from = max(0, len(self._text) - self._longest + 1)
        text = self._text + tail[len(known) :]
        if not tail.endswith(_BROKEN):
            self._text = text
            self._context, self._settled = self._settled, len(self._tokens)
        # A stop may have come together with the first bytes of the next character, whose end may never come.
        whole = text.rstrip(_BROKEN)
        found = [at for stop in self._stops if (at := whole.find(stop, search_from)) >= 0]
        return whole[: min(found)] if found else None
