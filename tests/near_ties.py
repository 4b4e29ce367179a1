"""Prompts on which a model decides nothing by a hair: experts are chosen by comparing floats, and whoever computes the same in
another order may choose another where two are as good as equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tests.tiny_models import prompts, reference

MARGIN = 1e-4  # between what is chosen and what isn't; float32 sums in different orders are a hundred times nearer


class Margins(TorchFunctionMode):
    """Notes how near the chosen come to the others, in `topk` and in comparisons of floats."""

    def __init__(self) -> None:
        self.least = float("inf")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.topk, Tensor.topk) and args[0].is_floating_point():
            dim = kwargs.get("dim", -1)
            count = out[0].shape[dim]
            ranked = args[0].sort(dim=dim, descending=True).values
            if count < ranked.shape[dim]:
                self._note(ranked.narrow(dim, count - 1, 1) - ranked.narrow(dim, count, 1))
        elif func in (torch.gt, Tensor.gt, Tensor.__gt__) and args[0].is_floating_point() and args[1] != 0:
            self._note((args[0] - args[1]).abs())  # activations compare with 0, where they have no jump
        return out

    def _note(self, gaps: Tensor) -> None:
        gaps = gaps[gaps.isfinite()]  # what is ruled out beforehand has minus infinity
        self.least = min(self.least, float(gaps.min()) if gaps.numel() else self.least)


def decided(model: PreTrainedModel, rng: random.Random, count: int) -> tuple[list[list[int]], list[Tensor]]:
    """Random prompts without near ties, and transformers' logits for them."""
    found: list[tuple[list[int], Tensor]] = []
    for _ in range(50 * count):
        (tokens,) = prompts(rng, 1)
        with Margins() as margins:
            logits = reference(model, tokens)
        if margins.least > MARGIN:
            found.append((tokens, logits))
        if len(found) == count:
            return [tokens for tokens, _ in found], [logits for _, logits in found]
    raise AssertionError("every prompt comes near a tie")
