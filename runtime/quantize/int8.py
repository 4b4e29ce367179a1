"""Weights of eight bits with one scale for each output, for a head that four bits would hurt."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N, K] whose element is code * scale. codes: int8 [N, K] in -127..127; scale: float32 [N]."""

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.scale.shape != self.codes.shape[:1]:
            raise ValueError(f"codes {tuple(self.codes.shape)} and scales {tuple(self.scale.shape)} don't fit")
        if not 1 <= self.codes.shape[1] <= 65536:
            raise ValueError(f"{self.codes.shape[1]} inputs: 1 to 65536 are taken, so that sums fit 32 bits")
        if (self.codes.dtype, self.scale.dtype) != (torch.int8, torch.float32):
            raise ValueError("codes are int8, scales float32")

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.codes.float() * self.scale[:, None]

    def rows(self, which: slice) -> "Int8Weight":
        """The weight of these outputs."""
        return Int8Weight(self.codes[which], self.scale[which])


def quantize(weight: Tensor) -> Int8Weight:
    """Rounds a weight [N, K] to the nearest codes, each row by itself: scale = amax / 127.

    Raises ValueError if the weight isn't finite.
    """
    weight = weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError("a weight that isn't finite cannot be quantised")
    scale = weight.abs().amax(-1) / 127.0
    scale = scale.where(scale > 2.0**-120, 1.0)
    codes = torch.round(weight / scale[:, None]).clamp_(-127, 127).to(torch.int8)
    return Int8Weight(codes, scale)
