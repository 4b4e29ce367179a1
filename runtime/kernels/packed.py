"""Weights as a kernel wants them: made by a kernel module's `pack_*`, read by the same module's product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.pages import Pages
from runtime.quantize.int4 import MIDDLE

ACTIVATIONS = ("int8", "16bit")


@dataclass(frozen=True)
class PackedInt4:
    """A four-bit weight [out_features, in_features] in a kernel module's own layout."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None  # None: 8 throughout
    out_features: int
    in_features: int
    group_size: int
    activations: str  # "int8": rounded for each row and group as the product starts; "16bit": as they are
    axis: int = 0  # of codes, scale and zero, along which outputs lie

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @classmethod
    def join(cls, pieces: Iterable[PackedInt4], out_features: int, pages: Pages) -> PackedInt4:
        """Weights of the same inputs, one under the other; all but the last have a multiple of 32 outputs.

        Codes are copied as they come into the place where they stay, so that memory isn't left full of holes.
        """
        first, codes, filled = None, torch.empty(0), 0
        scales: list[Tensor] = []
        zeros: list[Tensor | None] = []
        for piece in pieces:
            if first is None:
                shape = list(piece.codes.shape)
                shape[piece.axis] = -(-shape[piece.axis] * out_features // piece.out_features)
                first, codes = piece, pages.empty(shape, piece.codes.dtype, piece.codes.device)
            more = piece.codes.shape[piece.axis]
            codes.narrow(piece.axis, filled, more).copy_(piece.codes)
            filled += more
            scales.append(piece.scale)
            zeros.append(piece.zero)
        assert first is not None
        zero = None
        if any(z is not None for z in zeros):
            filler = (torch.full(s.shape, MIDDLE, dtype=torch.uint8, device=s.device) for s in scales)
            zero = torch.cat([f if z is None else z for z, f in zip(zeros, filler, strict=True)], first.axis)
        scale = torch.cat(scales, first.axis)  # of the wider dtype
        return replace(first, codes=codes, scale=scale, zero=zero, out_features=out_features)


@dataclass(frozen=True)
class PackedInt8:
    """An eight-bit weight [out_features, in_features] in a kernel module's own layout."""

    codes: Tensor
    scale: Tensor
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.codes.nbytes + self.scale.nbytes

    @classmethod
    def join(cls, pieces: Sequence[PackedInt8], pages: Pages) -> PackedInt8:
        """Weights of the same inputs, one under the other; all but the last have a multiple of 16 outputs."""
        first, scale = pieces[0].codes, torch.cat([piece.scale for piece in pieces])
        codes = pages.empty((sum(len(piece.codes) for piece in pieces), *first.shape[1:]), first.dtype, first.device)
        torch.cat([piece.codes for piece in pieces], out=codes)
        return cls(codes, scale, sum(piece.out_features for piece in pieces), pieces[0].in_features)


def narrow_scale(scale: Tensor) -> Tensor:
    """float32 scales as bfloat16 if that loses nothing, else as they are."""
    narrow = scale.bfloat16()
    return narrow if torch.equal(narrow.float(), scale) else scale
