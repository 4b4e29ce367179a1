"""GPTQ: rounding one input after the other, each time moving the error to the inputs that are still to come.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv 2210.17323, algorithm 1. What is made least is the error of the layer's outputs over
calibration, tr(D H D^T) with H the inputs' second moments; the row of the inverse's Cholesky factor says how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.quantize.grid import fit, rounded
from runtime.quantize.int4 import Int4Weight

BLOCK = 128  # inputs whose errors reach the others together: algorithm 1's B
DAMPING = 0.01  # of the mean of the diagonal, added to it


class NotFactored(ValueError):
    """The moments have no Cholesky factor even with the strongest damping: they aren't those of finite inputs."""


def gptq(
    weight: Tensor, moments: Tensor, group_size: int, symmetric: bool, *, activation_order: bool = True,
    damping: float = DAMPING,
) -> Int4Weight:  # fmt: skip
    """weight [N, K] float32, moments [K, K] float32 -> the weight in four bits. Raises NotFactored, ValueError.

    With `activation_order` inputs of large moments come first, and the groups' scales are those of the weight before
    any error was moved: so groups lie together in the inputs' own order and a file needs no index. Without, inputs come
    as they are and a group's scale is searched when its first input is reached.
    """
    inputs = weight.shape[1]
    if group_size < 1 or inputs % group_size or BLOCK % group_size:
        raise ValueError(f"{inputs} inputs in groups of {group_size}: a divisor of both the inputs and {BLOCK} is needed")
    if not bool(moments.any()):  # nothing ever came in: every error counts alike
        moments = torch.eye(inputs, device=weight.device)
    diagonal = moments.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else torch.arange(inputs)
    order = order.to(weight.device)
    factor = _factor(moments[order][:, order], damping)
    left = weight[:, order].clone()
    scale, zero = fit(weight, group_size, symmetric, moments)
    group_of = order // group_size
    made = torch.empty_like(left)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        errors = torch.empty_like(left[:, first:last])
        for i in range(first, last):
            group = int(group_of[i])
            if not activation_order and i % group_size == 0:
                # A group never reaches into the next block, so that all errors have come to it.
                which = slice(i, i + group_size)
                found = fit(left[:, which].contiguous(), group_size, symmetric, moments[which, which])
                scale[:, group], zero[:, group] = found[0][:, 0], found[1][:, 0]
            s, z = scale[:, group], zero[:, group].float()
            made[:, i] = ((torch.round(left[:, i] / s) + z).clamp_(0, 15) - z) * s
            error = (left[:, i] - made[:, i]) / factor[i, i]
            left[:, i:last] -= error[:, None] * factor[i, i:last]
            errors[:, i - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    # Every value is one of its group's sixteen, so that rounding to the nearest finds its code again.
    return rounded(made[:, torch.argsort(order)], scale, zero, group_size)


def compensated(weight: Tensor, moments: Tensor, cross: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight [N, K] that makes of the inputs as they have become what `weight` makes of them as they should be.

    moments: [K, K] float32, the mean of x x^T of the inputs as they are; cross: the mean of y x^T, y being what they would
    be had nothing before them been rounded. Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
    Calibration", ICML 2025, arXiv 2504.02692, minimise the same error column by column; here it is the least squares of the
    whole weight, damped towards no change. Raises NotFactored.
    """
    lower = _damped(moments, damping)
    shift = torch.cholesky_solve((cross - moments).t().double(), lower).t()
    return weight + (weight.double() @ shift).float()


def _factor(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor [K, K] float32 of the damped moments' inverse."""
    return torch.linalg.cholesky(torch.cholesky_inverse(_damped(moments, damping)), upper=True).float()


def _damped(moments: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor [K, K] float64 of the damped moments; damping grows tenfold where it must."""
    wide = moments.double()
    mean = wide.diagonal().mean()
    if not bool(torch.isfinite(wide).all()):
        raise NotFactored("the moments of a linear's inputs aren't finite")
    for strength in (damping, 10 * damping, 100 * damping):
        damped = wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * (strength * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not bad:
            factor: Tensor = lower
            return factor
    raise NotFactored("the moments of a linear's inputs have no Cholesky factor")
