"""Where the parts of a small model lie in one that is enlarged."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.shapes import Shape


class CannotEnlarge(ValueError):
    """The large shape has no room for the small model; says for what."""


def need(condition: bool, otherwise: str) -> None:
    """Raises CannotEnlarge(otherwise) unless the condition holds."""
    if not condition:
        raise CannotEnlarge(otherwise)


class Places:
    """Where the parts of a small model lie in a large one. Raises CannotEnlarge.

    copies: (first channel, factor) of the hidden state, the largest factor first. heads: for every large query head the
    small one it holds, or None. kv_heads: for every large key head (small key head, which of the m small heads around it
    in the output projection is heard), or None. channel: of the constant, if words are added.
    """

    def __init__(self, small: Shape, large: Shape) -> None:
        width, turns = small.hidden_size, large.head_dim // small.head_dim
        times = large.hidden_size // width
        need(large.hidden_size == times * width, f"a width of {large.hidden_size} is no multiple of {width}")
        need(large.head_dim == turns * small.head_dim, f"heads of {large.head_dim} are no multiple of {small.head_dim}")
        for name in ("num_hidden_layers", "intermediate_size", "vocab_size"):
            need(getattr(large, name) >= getattr(small, name), f"{name} of {getattr(large, name)} is too small")
        need(small.tie_word_embeddings or not large.tie_word_embeddings, "a head of its own cannot become tied")
        factors = [2.0**k for k in range(times.bit_length()) for _ in range(times // 4**k % 4)]
        self.copies = [(i * width, factor) for i, factor in enumerate(sorted(factors, reverse=True))]
        self.turns = turns
        self.channel = large.hidden_size - 1 if large.vocab_size > small.vocab_size else None
        if self.channel is not None:
            need(len(self.copies) < times, f"words can only be added to a width of {width} times 4 or more")
            need(large.num_hidden_layers > small.num_hidden_layers, "adding words takes one more layer")
            need(large.intermediate_size >= 2 * width, f"adding words takes an intermediate size of {2 * width}")
        self.kv_heads: list[tuple[int, int] | None] = [None] * large.num_key_value_heads
        self.heads: list[int | None] = [None] * large.num_attention_heads
        self._seat(small.num_attention_heads // small.num_key_value_heads, small.num_attention_heads)

    def _seat(self, sharing: int, heads: int) -> None:
        """Small heads go where a large key head's values are heard at their place."""
        seats = len(self.heads) // len(self.kv_heads)
        taken = 0
        free: dict[tuple[int, int], list[int]] = {}
        for head in range(heads):
            kind = (head // sharing, head % self.turns)
            if not free.get(kind):
                need(taken < len(self.kv_heads), f"{len(self.kv_heads)} key-value heads are too few")
                self.kv_heads[taken] = kind
                free[kind] = list(range(taken * seats, (taken + 1) * seats))
                taken += 1
            self.heads[free[kind].pop(0)] = head

    def turning(self, turn: int, dim: int) -> Tensor:
        """Where the dimensions of a small head of `dim` lie in a large one; at turn 0 they rotate as they did."""
        first = self.turns * torch.arange(dim // 2) + turn
        return torch.cat([first, first + self.turns * dim // 2])
