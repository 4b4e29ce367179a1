"""Logits that are known within bounds, and who of them gets exact ones, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.arguments import check_screen
from runtime.kernels.folding import fold

# How many standard errors a logit may be off. Sums of many rounding errors are normal, and beyond six once in 500 million; that
# there are two more is for inputs of which few outweigh all others, and for samples: what comes near the best gets exact too.
SIGMAS = 8.0


def floors(logits: Tensor, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """How far off a row's logits may be, per error, and the floor under its largest: reach and floor, float32 [R].

    logits [R, V] of x [R, K] by a weight whose values are off by `errors` float32 [V], the root mean square of each output's:
    a logit then lies within reach * errors, reach = SIGMAS * |x|, and the largest is no less than the largest of all lower
    ends. Raises ValueError.
    """
    check_screen(logits, x, errors)
    reach = SIGMAS * fold(x.float().square()).sqrt()
    return reach, (logits.float() - reach[:, None] * errors).amax(1)


def refine(logits: Tensor, x: Tensor, weight: Tensor, errors: Tensor, reach: Tensor, floor: Tensor) -> None:
    """Logits whose upper ends come up to the floor become x times weight [V, K], in place; see `floors`.

    In float32, in an order of the implementation's own that nothing but K decides. Raises ValueError.
    """
    check_screen(logits, x, errors, weight)
    rows, tokens = torch.nonzero(logits.float() + reach[:, None] * errors >= floor[:, None], as_tuple=True)
    logits[rows, tokens] = fold(x[rows].float() * weight[tokens].float()).to(logits.dtype)
