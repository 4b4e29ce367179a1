"""Weights of four bits, group-wise along the inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIDDLE = 8  # the code that means zero in a symmetric group
NOT_FINITE = "a weight that isn't finite cannot be quantised"


@dataclass(frozen=True)
class Int4Weight:
    """A weight [N, K] whose element is (code - zero) * scale, with one zero and scale for `group_size` inputs.

    codes: uint8 [N, K] in 0..15; scale: float32 [N, K / group_size]; zero: uint8 [N, K / group_size], 8 throughout when
    symmetric. Scales made by `quantize` are bfloat16 values, so that kernels may hold them in 16 bit.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int

    def __post_init__(self) -> None:
        outputs, inputs = self.codes.shape
        if self.group_size < 1 or inputs % self.group_size:
            raise ValueError(f"{inputs} inputs don't divide into groups of {self.group_size}")
        groups = (outputs, inputs // self.group_size)
        if self.scale.shape != groups or self.zero.shape != groups:
            raise ValueError(f"scales {tuple(self.scale.shape)} and zeros {tuple(self.zero.shape)} must be {groups}")
        if (self.codes.dtype, self.scale.dtype, self.zero.dtype) != (torch.uint8, torch.float32, torch.uint8):
            raise ValueError("codes and zeros are uint8, scales float32")

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        codes = self.codes.view(*self.scale.shape, self.group_size)
        return ((codes.float() - self.zero[..., None].float()) * self.scale[..., None]).view(self.codes.shape)

    def to(self, device: torch.device) -> "Int4Weight":
        """The same weight on a device."""
        return Int4Weight(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.group_size)

    def rows(self, which: slice) -> "Int4Weight":
        """The weight of these outputs."""
        return Int4Weight(self.codes[which], self.scale[which], self.zero[which], self.group_size)

    def groups(self, which: slice) -> "Int4Weight":
        """The weight of these groups of inputs; `which` counts groups and has no step."""
        first, last, step = which.indices(self.scale.shape[1])
        if step != 1:
            raise ValueError("groups are taken without a step")
        inputs = slice(first * self.group_size, max(first, last) * self.group_size)
        return Int4Weight(self.codes[:, inputs], self.scale[:, which], self.zero[:, which], self.group_size)


def merge(weights: Sequence[Int4Weight]) -> Int4Weight:
    """Weights of the same inputs and group size, laid one under the other."""
    if len(weights) == 1:
        return weights[0]
    return Int4Weight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        torch.cat([weight.zero for weight in weights]),
        weights[0].group_size,
    )


def quantize(weight: Tensor, group_size: int, symmetric: bool) -> Int4Weight:
    """Rounds a weight [N, K] to the nearest codes, each group by itself, so that slices commute with it bit for bit.

    With zero points the codes 0..15 span the group's smallest and largest element, zero included. A symmetric group
    tries three scales, amax / 7, amax / 7.5 and amax / 8, with codes -8..7 around 8, and takes the one with the least
    squared error (the first of equals). A scale is rounded to bfloat16 before the codes are made. Raises ValueError if
    K doesn't divide into groups or the weight isn't finite.
    """
    outputs, inputs = weight.shape
    if group_size < 1 or inputs % group_size:
        raise ValueError(f"{inputs} inputs don't divide into groups of {group_size}")
    group = weight.detach().float().reshape(outputs, inputs // group_size, group_size)
    if not torch.isfinite(group).all():
        raise ValueError(NOT_FINITE)
    if symmetric:
        zero = torch.full(group.shape[:2], MIDDLE, dtype=torch.uint8, device=weight.device)
        scale, codes = _symmetric(group)
    else:
        low, high = group.amin(-1).clamp(max=0.0), group.amax(-1).clamp(min=0.0)
        scale = _scale((high - low) / 15.0)
        zero = torch.round(-low / scale).clamp(0, 15).to(torch.uint8)
        codes = _codes(group, scale, zero.float())
    return Int4Weight(codes.view(outputs, inputs), scale, zero, group_size)


def _scale(x: Tensor) -> Tensor:
    """The bfloat16 value next to x, as float32; 1 for a group that is as good as zero."""
    scale = x.bfloat16().float()
    return scale.where(scale > 2.0**-120, 1.0)


def _codes(group: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.round(group / scale[..., None]) + zero[..., None]).clamp_(0, 15).to(torch.uint8)


def _symmetric(group: Tensor) -> tuple[Tensor, Tensor]:
    amax = group.abs().amax(-1)
    zero = torch.full_like(amax, MIDDLE)
    best = torch.full_like(amax, torch.inf)
    scale, codes = torch.ones_like(amax), torch.zeros_like(group, dtype=torch.uint8)
    for steps in (7.0, 7.5, 8.0):
        tried = _scale(amax / steps)
        made = _codes(group, tried, zero)
        error = _fold(((made.float() - MIDDLE) * tried[..., None] - group) ** 2)
        better = error < best
        best = error.where(better, best)
        scale = tried.where(better, scale)
        codes = made.where(better[..., None], codes)
    return scale, codes


def _fold(x: Tensor) -> Tensor:
    """The sum over the last dimension, in an order that its length alone fixes."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = torch.cat([x[..., :half] + x[..., half : 2 * half], x[..., 2 * half :]], dim=-1)
    return x[..., 0]
