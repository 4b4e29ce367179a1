"""Rows of numbers in eight bits, each with a scale of its own: of activations, and of the KV cache.

A row of an eight-bit cache is its codes and, behind them, its scale: four bytes that hold a float32. So whatever moves or
forgets rows moves and forgets their scales.
"""

import torch
from torch import Tensor

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest code
SCALE = 4  # bytes


def cache_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row of a cache of this dtype."""
    return head_dim + SCALE if dtype in MOST else head_dim


def head_dim_of(cache: Tensor) -> int:
    """The numbers of a row of a cache [..., width]."""
    return cache.shape[-1] - (SCALE if cache.dtype in MOST else 0)


def scaled(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Rows float32 [..., n] -> x * (most / amax), and scales amax / most [...], amax a row's largest magnitude.

    Below 2^-100 a row counts as zero; where it isn't finite it becomes zero and its scale NaN.
    """
    amax = x.abs().amax(-1)
    some = (amax >= 2.0**-100) & amax.isfinite()
    steps = torch.full_like(amax, most)  # a tensor: torch divides by or of a number as it likes
    scale = (amax / steps).where(some, 0.0).where(amax.isfinite(), float("nan"))
    return (x * (steps / amax)[..., None]).where(some[..., None], 0.0), scale


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows float32 [..., D], D a multiple of 4, as rows of a cache of this dtype [..., D + 4]; codes are rounded to even."""
    y, scale = scaled(x, MOST[dtype])
    codes = torch.round(y).to(torch.int8) if dtype == torch.int8 else y.to(dtype).view(torch.int8)
    return torch.cat([codes, scale[..., None].view(torch.int8)], dim=-1).view(dtype)


def decode(rows: Tensor) -> Tensor:
    """Rows of an eight-bit cache [..., D + 4] -> float32 [..., D], code * scale."""
    raw = rows.view(torch.int8)
    codes, scale = raw[..., :-SCALE].contiguous(), raw[..., -SCALE:].contiguous().view(torch.float32)
    return codes.view(rows.dtype).float() * scale
