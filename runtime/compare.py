"""How far one model's next-token distributions are from another's, on the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp

import torch
from torch import Tensor

from runtime.batch import Batch, Piece
from runtime.blocks import blocks_for
from runtime.kv_cache import KVCache, held_dtype
from runtime.model import Model

BLOCK = 16
ROWS = 512  # whose distributions are held in float32 at a time


@dataclass
class Comparison:
    """Sums over the positions of text, teacher-forced: each token is predicted from the true ones before it."""

    positions: int = 0
    reference_loss: float = 0.0
    model_loss: float = 0.0
    divergence: float = 0.0
    flips: int = 0
    runs: list[int] = field(default_factory=list)

    def add(self, reference: Tensor, model: Tensor, targets: Tensor) -> None:
        """Logits [T, V] of one window from both models, and the tokens that came, int64 [T]."""
        flipped = []
        for i in range(0, len(targets), ROWS):
            p, q = (torch.log_softmax(x[i : i + ROWS].float(), dim=-1) for x in (reference, model))
            wanted = targets[i : i + ROWS, None]
            self.reference_loss -= float(p.gather(1, wanted).sum(dtype=torch.float64))
            self.model_loss -= float(q.gather(1, wanted).sum(dtype=torch.float64))
            self.divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            flipped.append(p.argmax(-1) != q.argmax(-1))  # both take the first of equals
        found = torch.nonzero(torch.cat(flipped)).flatten().tolist()
        self.positions += len(targets)
        self.flips += len(found)
        self.runs.append(found[0] if found else len(targets))

    def summary(self) -> dict[str, float]:
        """perplexity of both, mean KL(reference || model) in nats, share of greedy decisions that differ, and the mean
        number of tokens of a window before the first that does (a window's length where none does)."""
        if not self.positions:
            raise ValueError("nothing was compared")
        return {
            "positions": self.positions,
            "reference_perplexity": exp(self.reference_loss / self.positions),
            "model_perplexity": exp(self.model_loss / self.positions),
            "divergence": self.divergence / self.positions,
            "flips": self.flips / self.positions,
            "tokens_before_flip": sum(self.runs) / len(self.runs),
        }


def logits_of(model: Model, windows: Sequence[Sequence[int]], held: str = "auto") -> Iterator[Tensor]:
    """The logits [T, V] of each window of tokens, of a model that one rank holds whole; held: how its cache is."""
    longest = max(map(len, windows))
    count = blocks_for(longest, BLOCK)
    cache = KVCache(model.cache_shape, count, BLOCK, held_dtype(held, model.dtype), model.device)
    for tokens in windows:
        piece = Piece(tokens, 0, list(range(blocks_for(len(tokens), BLOCK))), len(tokens))
        yield model.forward(Batch.build([piece], BLOCK, model.device), cache)


def compare(
    reference: Model, model: Model, windows: Sequence[Sequence[int]], held: str = "auto"
) -> Iterator[Comparison]:  # fmt: skip
    """The comparison after each window of two tokens or more; held: how the model's cache is, `engine.kv_cache_dtype`.

    Raises ValueError for models of different vocabularies.
    """
    if reference.vocab_size != model.vocab_size:
        raise ValueError(f"vocabularies of {reference.vocab_size} and {model.vocab_size} tokens cannot be compared")
    found = Comparison()
    inputs = [tokens[:-1] for tokens in windows]
    for tokens, a, b in zip(windows, logits_of(reference, inputs), logits_of(model, inputs, held), strict=True):
        found.add(a, b, torch.tensor(tokens[1:], device=a.device))
        yield found
