"""Log-probabilities on their way from the ranks to a completion."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.request import TokenLogprob
from runtime.verify import Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """What a round found out about tokens, of the prompt or decided.

    slots, positions, tokens, counts: int32 [A], a token's slot, its position in the sequence, its id, and how many of the
    likeliest tokens go with it; values: float32 [A], its log-probability; top_tokens int32 and top_values float32
    [sum of counts], the likeliest first.
    """

    slots: Ints
    positions: Ints
    tokens: Ints
    counts: Ints
    values: Floats
    top_tokens: Ints
    top_values: Floats

    def by_slot(self) -> dict[int, dict[int, TokenLogprob]]:
        """What is known of every slot's positions."""
        found: dict[int, dict[int, TokenLogprob]] = {}
        top = list(zip(self.top_tokens.tolist(), self.top_values.tolist(), strict=True))
        rows = zip(self.slots.tolist(), self.positions.tolist(), self.tokens.tolist(), self.values.tolist(), strict=True)
        offset = 0
        for (slot, position, token, value), count in zip(rows, self.counts.tolist(), strict=True):
            found.setdefault(slot, {})[position] = TokenLogprob(token, value, tuple(top[offset : offset + count]))
            offset += count
        return found
