"""What is made of logits, in plain torch: the best tokens, and lists of candidates for who filters them."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.arguments import check_best, check_candidates
from runtime.noise import SPREAD, gumbel
from runtime.order import best_keys, ids_of, keys_of, values_in
from runtime.softmax import sums


def best_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int, cuts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best (score, token id) of every row within a slice of the vocabulary whose first token has the id `first`.

    logits [R, V], any float dtype; temperatures [R] float32, 0 for greedy; seeds [R] int64; positions [R] int64, of the
    tokens to be decided. A score is logits / temperature + gumbel(seed, position, id), or the logit itself where the
    temperature is 0. cuts: int64 [R], of each row the smallest key (`runtime.order`) of logits / temperature and id that may
    win; where none may, the score is -inf. Returns scores [R] float32 and ids [R] int64; a tie goes to the smallest id. A row
    with a NaN has the score NaN. Implementations may differ in the last bit of the noise.
    """
    check_best(logits, temperatures, seeds, positions, cuts)
    logits = logits.float() if cuts is None else cut(logits, temperatures, cuts, first)
    ids = logits.argmax(dim=1)
    scores = logits.gather(1, ids[:, None])[:, 0]
    sampled = torch.nonzero((temperatures > 0) & ~scores.isnan()).flatten()
    if len(sampled):
        scaled = logits[sampled] / temperatures[sampled, None]
        # Noise lies within fixed bounds: a token further than their difference under the best needs none.
        rows, tokens = torch.nonzero(scaled >= scaled.amax(dim=1, keepdim=True) - SPREAD, as_tuple=True)
        noisy = scaled[rows, tokens] + gumbel(seeds[sampled][rows], positions[sampled][rows], tokens + first)
        best = noisy.new_full((len(sampled),), -torch.inf).scatter_reduce(0, rows, noisy, "amax")
        winners = torch.where(noisy == best[rows], tokens, logits.shape[1])
        scores[sampled] = best
        ids[sampled] = torch.full_like(sampled, logits.shape[1]).scatter_reduce(0, rows, winners, "amin")
    return scores, ids + first


def candidates(logits: Tensor, temperatures: Tensor, count: int, first: int) -> Tensor:
    """Keys (`runtime.order`) of every row's `count` likeliest tokens within a slice of the vocabulary.

    logits [R, V], any float dtype; temperatures float32 [R], 0 for 1; first: id of the slice's first token. Returns keys of
    logits / temperature and id, int64 [R, count], the largest first, NONE where the slice has no more. A NaN counts as -inf.
    Raises ValueError.
    """
    check_candidates(logits, temperatures, count)
    scaled = _scaled(logits, temperatures)
    scaled = scaled.where(~scaled.isnan(), -torch.inf)
    return best_keys(keys_of(scaled, torch.arange(first, first + scaled.shape[1], device=scaled.device)), count)


def masses(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Every row's sum of exp(logits / temperature - the largest of them), float64 [R]; arguments as in `candidates`.

    0 where the largest is infinite; a NaN counts as -inf. Raises ValueError.
    """
    check_candidates(logits, temperatures)
    scaled = _scaled(logits, temperatures)
    scaled = scaled.where(~scaled.isnan(), -torch.inf)
    tops = scaled.amax(1).double()
    return sums(scaled, tops).where(tops.isfinite(), 0.0)


def cut(logits: Tensor, temperatures: Tensor, cuts: Tensor, first: int) -> Tensor:
    """Logits in float32, -inf where the key is below its row's cut; a NaN stays."""
    logits = logits.float()
    scaled, least = _scaled(logits, temperatures), values_in(cuts)[:, None]
    ids = torch.arange(first, first + logits.shape[1], device=logits.device)
    below = (scaled < least) | ((scaled == least) & (ids > ids_of(cuts)[:, None]))  # never where there is no cut: least is NaN
    return logits.where(~below, -torch.inf)


def _scaled(logits: Tensor, temperatures: Tensor) -> Tensor:
    return logits.float() / temperatures.where(temperatures > 0, 1.0)[:, None]
