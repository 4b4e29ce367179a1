"""Sums of exponentials whose bits depend on nothing but the row: not on other rows, nor on where a row lies in memory.

Everything is float64, made of additions, products and shifts, each rounded by itself. Libraries' own exponentials may
differ in the last bit between a tensor's body and its tail, and their sums between numbers of rows or threads.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from runtime.kernels.folding import fold

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
    p.mul_(_powers(x.device)[whole & PARTS - 1])
    p.mul_((whole.bitwise_right_shift_(6).add_(1023).bitwise_left_shift_(52)).view(torch.float64))
    return p.masked_fill_(x < -700.0, 0.0)


@cache
def _powers(device: torch.device) -> Tensor:
    """2^(i / PARTS), i from 0; kept, as a copy to a device would end the capture of a graph."""
    return torch.tensor([2 ** (i / PARTS) for i in range(PARTS)], dtype=torch.float64, device=device)


def running(x: Tensor) -> Tensor:
    """Every row's sums up to and with each place; [R, W] of floats. A place's bits depend on nothing that follows it."""
    step = 1
    while step < x.shape[1]:
        x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step]], dim=1)
        step *= 2
    return x


def sums(x: Tensor, tops: Tensor) -> Tensor:
    """Every row's sum of exp(x - top).

    x: [R, W], float32 or narrower; tops: float64 [R], none below a row's largest. Returns float64 [R]. A row with an infinite
    top gives NaN.
    """
    step = max(1, ELEMENTS // max(1, x.shape[1]))
    parts = [torch.zeros(0, dtype=torch.float64, device=x.device)]
    for i in range(0, len(x), step):
        parts.append(fold(exp(x[i : i + step].double() - tops[i : i + step, None])))
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
