"""A running sequence: its tokens, how far they are decided and how far computed.

The coordinator and every rank of a group hold the same `Sequence` and move it by the same calls, so that they agree
without telling each other more than the decided tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sequence:
    """One request while it runs.

    tokens: prompt and output, all of them committed (decided, never to change).
    num_computed: leading tokens whose keys and values are in the cache; always less than `num_committed`, because the
        last token is an input still to be computed. A rollback is nothing but a smaller `num_computed`.
    blocks: the cache blocks of this sequence, in order of position.
    index, copy: its name, as in `runtime.request.Request`.
    borrows: whether it may start behind blocks that another copy of its prompt has computed; not where the whole prompt's
        log-probabilities are wanted, which come from computing it.
    limit: committed tokens at which it ends ("length"); ends: token ids that end it ("stop").
    """

    index: int
    slot: int
    tokens: list[int]
    num_prompt: int
    limit: int
    ends: frozenset[int]
    temperature: float
    seed: int
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    copy: int = 0
    borrows: bool = True

    @property
    def name(self) -> tuple[int, int]:
        return self.index, self.copy

    @property
    def num_committed(self) -> int:
        return len(self.tokens)

    @property
    def output(self) -> list[int]:
        """The committed tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    def commit(self, tokens: Iterable[int]) -> list[int]:
        """Appends decided tokens up to the one that ends the sequence; returns those that were appended.

        The keys and values of all of them but the last are in the cache: a decision's tokens are drafts that stood,
        which the check computed, and one token after them, which nothing has computed yet.
        """
        kept: list[int] = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            kept.append(token)
            if token in self.ends:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.limit:
                self.finish_reason = "length"
        self.num_computed = self.num_committed - 1
        return kept

    def finish(self, reason: str) -> None:
        """Ends the sequence for a cause outside the tokens themselves, such as a stop string."""
        self.finish_reason = reason
