"""AWQ: the inputs that matter most get finer steps, by a scale that is taken back where those inputs are made.

Lin, Tang, Tang, Yang, Dang and Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
MLSys 2024, arXiv 2306.00978, section 3.2: s = (mean magnitude of the input) ** alpha, alpha searched on a grid for the
least output error. The clipping search is `grid.fit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.quantize.grid import error_under, fit, rounded
from runtime.quantize.int4 import Int4Weight, quantize

GRID = 20


def search_scale(weights: Sequence[Tensor], moments: Tensor, magnitude: Tensor, group_size: int, symmetric: bool) -> Tensor:
    """The scale [K] for the inputs that `weights` [N, K] share: all ones unless something is better on calibration.

    moments: [K, K] float32 of those inputs; magnitude: [K] float32, the mean of their absolute values.
    """
    best, found = None, torch.ones_like(magnitude)
    for step in range(GRID):
        scale = magnitude.clamp(min=1e-4) ** (step / GRID)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        error = sum(
            error_under(moments, weight, quantize(weight * scale, group_size, symmetric).dequantize() / scale)
            for weight in weights
        )
        if best is None or error < best:
            best, found = error, scale
    return found


def clipped(weight: Tensor, moments: Tensor, group_size: int, symmetric: bool) -> Int4Weight:
    """weight [N, K] rounded to nearest under clipped ranges, or plainly where those do worse on calibration."""
    plain = quantize(weight, group_size, symmetric)
    other = rounded(weight, *fit(weight, group_size, symmetric, moments), group_size)
    better = error_under(moments, weight, other.dequantize()) < error_under(moments, weight, plain.dequantize())
    return other if better else plain
