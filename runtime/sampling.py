"""The one rule over a slice of the vocabulary: a position's token is the arg-max of logits / temperature + noise."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels import select

GREEDY_BELOW = 1e-5  # temperatures under this are 0, as in vLLM: logits over them would overflow


def local_best(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The best (score, token id) of every row within this rank's slice of the vocabulary.

    logits: [R, V/ranks], any float dtype. temperatures: float32 [R], 0 for greedy. seeds, positions: int64 [R]; the
    position is that of the token to be decided. first: id of the slice's first token.
    Returns (scores float32 [R], ids int64 [R]); a tie goes to the smallest id. A row depends on no other row.
    """
    temperatures = torch.where(temperatures < GREEDY_BELOW, 0, temperatures)
    best: tuple[Tensor, Tensor] = select(logits.device).best_tokens(logits, temperatures, seeds, positions, first)
    return best
