"""What a grammar lets follow an output, as a mask over the vocabulary; llguidance compiles and follows the grammars.

A grammar travels as text in llguidance's variant of Lark's notation, into which JSON schemas and regular expressions are
brought (`launcher/structure.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPILED = 64  # distinct grammars whose compiled form is kept

# Otherwise llguidance would let a text that must come now come in its usual tokens only; allowed is what the text allows.
EVERY_WAY = '\n%llguidance {"no_forcing": true}\n'

SOURCE = re.compile(r"\s*(\d+ \||\^|$)")  # lines of a message that repeat a grammar or point into it
LONGEST = 300  # characters of a message

Bits = NDArray[np.bool_]


class GrammarError(Exception):
    """A grammar, or a tokenizer, with which no output can be guided; the message says why."""


class Guide:
    """Follows one sequence through its grammar.

    What it answers is a function of the grammar and the output alone: what it has followed last is kept for speed, and a
    longer, shorter or different output makes it go on, go back, or start again. So nothing has to be told to it when drafts
    fall or a sequence is put back.
    """

    def __init__(self, compiled: Any, ends: frozenset[int], width: int) -> None:
        self._compiled, self._ends = compiled, ends
        self._matcher = compiled.deep_copy()
        self._followed: list[int] = []
        self._words = np.zeros(-(-width // 32), np.int32)

    def mask(self, output: list[int]) -> Bits:
        """Which tokens may follow this output, bool [V or a little more]; end tokens are among them where it is whole.

        Nothing may where the output has left the grammar or ended, or where the grammar has no way on.
        """
        self._words.fill(0)
        if self._follow(output):
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            if self._matcher.is_error():
                self._words.fill(0)
                self._restart()
        return np.unpackbits(self._words.view(np.uint8), bitorder="little").view(np.bool_)

    def stand(self, output: list[int], drafts: list[int]) -> int:
        """How many of the drafts, from the first on, the grammar lets follow this output; an end token is the last one."""
        if not self._follow(output):
            return 0
        end = next((i for i, draft in enumerate(drafts) if draft in self._ends), len(drafts))
        count: int = self._matcher.validate_tokens(drafts[:end])
        if count == end < len(drafts):
            count += self._follow(output + drafts[:end]) and self._matcher.is_accepting()
        return count

    def _follow(self, output: list[int]) -> bool:
        """Takes the matcher to where this output leads; false where the grammar doesn't let it go there."""
        if self._ends.intersection(output[-1:]):
            return False
        known = len(self._followed)
        if output[:known] != self._followed:
            known = next(i for i, token in enumerate(self._followed) if output[i : i + 1] != [token])
            if not self._matcher.rollback(len(self._followed) - known):
                self._restart()
                known = 0
        taken = self._matcher.try_consume_tokens(output[known:])
        self._followed = output[: known + taken]
        if self._matcher.is_error():  # an id out of range; it would stay so
            self._restart()
        return len(self._followed) == len(output)

    def _restart(self) -> None:
        self._matcher, self._followed = self._compiled.deep_copy(), []


class Grammars:
    """Compiles grammars for one model's vocabulary, each distinct one once.

    load: gives the model's tokenizer. It is called, and llguidance imported, when the first grammar comes. vocab_size: of
    the model, which may have more ids than its tokenizer. ends: the model's end tokens, which a grammar ends with.
    """

    def __init__(self, load: Callable[[], Any], vocab_size: int, ends: frozenset[int]) -> None:
        self._load, self._vocab_size, self._ends = load, vocab_size, ends
        self._words: Any = None
        self._compile = lru_cache(COMPILED)(self._compiled)

    def guide(self, text: str) -> Guide:
        """A guide at the beginning of a grammar. Raises GrammarError."""
        return Guide(self._compile(text), self._ends, self._words.vocab_size)

    def _compiled(self, text: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), text + EVERY_WAY, log_level=0)
        if matcher.is_error():
            # What went wrong, without the lines that show where in a text which nobody wrote so.
            said = [line.strip() for line in matcher.get_error().splitlines() if not SOURCE.match(line)]
            raise GrammarError(" ".join(said)[:LONGEST])
        return matcher

    def _vocabulary(self) -> Any:
        """The tokens' bytes as llguidance holds them, worked out once."""
        if self._words is None:
            from llguidance.hf import from_tokenizer

            if not self._ends:
                raise GrammarError("the model has no end token, without which no grammar could end")
            try:
                tokenizer = self._load()
                size = max(self._vocab_size, len(tokenizer))
                self._words = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(self._ends))
            except Exception as error:  # of a kind of its own for every kind of tokenizer
                raise GrammarError(f"the model's tokenizer cannot be guided: {error}") from error
        return self._words
