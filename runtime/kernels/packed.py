"""Weights as a kernel wants them: made by a kernel module's `pack_*`, read by the same module's product."""

from dataclasses import dataclass

import torch
from torch import Tensor

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

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)


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


def narrow_scale(scale: Tensor) -> Tensor:
    """float32 scales as bfloat16 if that loses nothing, else as they are."""
    narrow = scale.bfloat16()
    return narrow if torch.equal(narrow.float(), scale) else scale
