"""A head that is read in four bits, and exact where it matters: among the tokens that may win."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from runtime.comm import Communicator
from runtime.linear import Int4


class Screened:
    """A head's product: four-bit weights give every logit, 16-bit ones of the same head those that may be the largest.

    weight [N, K]: the head's in the model's dtype; errors float32 [N]: the root mean square of what four bits change of each
    token's weights. Rounding errs as if by chance, so a logit lies within a few |x| * error of the four-bit one; only those
    that may reach the largest lower end, of all ranks, are computed from `weight`. kept: bytes of it, if nobody else has it.
    """

    def __init__(
        self, coarse: Int4, weight: Tensor, errors: Tensor, kernels: ModuleType, comm: Communicator, kept: int
    ) -> None:
        self.coarse, self.weight, self.errors, self.kept = coarse, weight, errors, kept
        self.in_features, self.out_features = coarse.in_features, coarse.out_features
        self.nbytes = coarse.nbytes + errors.nbytes
        self._kernels, self._comm = kernels, comm

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[M, in_features] -> [M, out_features], of `dtype` or else x's; M may be 0."""
        logits = self.coarse(x)
        if len(x):
            reach, floor = self._kernels.floors(logits, x, self.errors)
            if self._comm.size > 1:
                floor = self._comm.all_gather(floor).amax(0)
            self._kernels.refine(logits, x, self.weight, self.errors, reach, floor)
        return logits if dtype is None else logits.to(dtype)
