"""Where a group's sixteen values lie: scales and zero points searched for the least error, not only read off the ends.

To clip a group's outliers makes everything else finer. Lin et al. (AWQ, arXiv 2306.00978, section 3.3 and its code) search
the share that is clipped; the error here is that of the group's output under its inputs' second moments, where they are
known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.quantize.int4 import MIDDLE, Int4Weight

STEPS = 24
SMALLEST = 0.5  # of the range is kept at least


def fit(weight: Tensor, group_size: int, symmetric: bool, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] float32, moments [K, K] float32 or none -> scale float32 [N, G] (bfloat16 values), zero uint8 [N, G].

    The error of a group is d^T M d, with d its rounding error and M its own block of the moments; the plain sum of
    squares without. Candidates keep 1 to 0.5 of the range; the first of equals wins.
    """
    outputs, inputs = weight.shape
    groups = weight.view(outputs, inputs // group_size, group_size)
    blocks = None if moments is None else _blocks(moments, group_size)
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.full_like(low, MIDDLE)
    for step in range(STEPS + 1):
        share = 1.0 - (1.0 - SMALLEST) * step / STEPS
        if symmetric:
            tried = narrow(torch.maximum(-low, high) * share / 7.0)
            middle = torch.full_like(low, MIDDLE)
        else:
            tried = narrow((high - low) * share / 15.0)
            middle = torch.round(-low * share / tried).clamp_(0, 15)
        off = apply(groups, tried, middle) - groups
        pushed = off if blocks is None else torch.einsum("ngi,gij->ngj", off, blocks)
        error = (off * pushed).sum(-1)
        better = error < best
        best = error.where(better, best)
        scale, zero = tried.where(better, scale), middle.where(better, zero)
    return scale, zero.to(torch.uint8)


def narrow(x: Tensor) -> Tensor:
    """The bfloat16 value next to a scale, as float32; 1 for a group that is as good as zero."""
    scale = x.bfloat16().float()
    return scale.where(scale > 2.0**-120, 1.0)


def apply(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What four bits leave of groups [..., g] with scales and zeros [...]: float32 of their shape."""
    codes = (torch.round(groups / scale[..., None]) + zero[..., None].float()).clamp_(0, 15)
    return (codes - zero[..., None].float()) * scale[..., None]


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Int4Weight:
    """The weight [N, K] rounded to the nearest codes under scales and zeros [N, G]."""
    groups = weight.view(*scale.shape, group_size)
    codes = (torch.round(groups / scale[..., None]) + zero[..., None].float()).clamp_(0, 15)
    return Int4Weight(codes.to(torch.uint8).view(weight.shape), scale, zero, group_size)


def error_under(moments: Tensor, weight: Tensor, made: Tensor) -> float:
    """The sum over calibration of the squared error of a linear's outputs, up to a factor: tr(D M D^T), D = made - weight."""
    off = made - weight
    return float(((off @ moments) * off).sum(dtype=torch.float64))


def _blocks(moments: Tensor, size: int) -> Tensor:
    """The diagonal's blocks [G, g, g] of [K, K]."""
    count = len(moments) // size
    return torch.stack([moments[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
