"""Sums of exponentials whose bits depend on nothing but the row: not on other rows, nor on where a row lies in memory.

Everything is float64, made of additions, products and shifts, each rounded by itself. Libraries' own exponentials may
differ in the last bit between a tensor's body and its tail, and their sums between numbers of rows or threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runtime.kernels.reference import fold

ELEMENTS = 1 << 18  # of the largest temporary
PARTS = 64  # of an octave; a polynomial of degree 5 is exact within 1/64 of one, up to rounding
# ln 2 / 64 in two parts, of which the first times a whole number below 2^20 is exact (the constants of fdlibm's e_exp.c).
_HIGH, _LOW = 6.93147180369123816490e-01 / PARTS, 1.90821492927058770002e-10 / PARTS


def exp(x: Tensor) -> Tensor:
    """e^x of float64 x <= 0, any shape, within two units in the last place; 0 below -700 (e^-700 is 1e-304)."""
    clamped = x.clamp(min=-700.0)
    n = (clamped * (PARTS / math.log(2))).round_()
    r = clamped.sub_(n * _HIGH).sub_(n * _LOW)
    p = r * (1 / 120)
    for c in (1 / 24, 1 / 6, 1 / 2, 1.0):
        p.add_(c).mul_(r)
    p.add_(1.0)
    whole = n.long()
    table = torch.tensor([2 ** (i / PARTS) for i in range(PARTS)], dtype=torch.float64, device=x.device)
    p.mul_(table[whole & PARTS - 1])
    p.mul_((whole.bitwise_right_shift_(6).add_(1023).bitwise_left_shift_(52)).view(torch.float64))
    return p.masked_fill_(x < -700.0, 0.0)


def sums(x: Tensor, tops: Tensor, floors: Tensor | None = None) -> Tensor:
    """Every row's sum of exp(x - top), over what is at least `floors` where that is given.

    x: [R, W], float32 or narrower; tops, floors: float64 [R], no top below a row's largest. Returns float64 [R]. A row with
    an infinite top gives NaN.
    """
    step = max(1, ELEMENTS // max(1, x.shape[1]))
    parts = [torch.zeros(0, dtype=torch.float64, device=x.device)]
    for i in range(0, len(x), step):
        wide = x[i : i + step].double()
        masses = exp(wide - tops[i : i + step, None])
        if floors is not None:
            masses = masses.where(wide >= floors[i : i + step, None], 0.0)
        parts.append(fold(masses))
    return torch.cat(parts).where(tops.isfinite(), torch.nan)


def merge_sums(tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of a whole row from its slices: (top, total) pairs, float64 [ranks, R] -> [R] each, added in rank order.

    The log-sum-exp is top + log(total). A slice that is all -inf counts for nothing.
    """
    top = tops.amax(0)
    total = torch.zeros_like(top)
    for slice_top, slice_total in zip(tops, totals, strict=True):
        total = total + (slice_total * exp(slice_top - top)).where(slice_top > -torch.inf, 0.0)
    return top, total
