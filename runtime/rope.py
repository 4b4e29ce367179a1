"""Rotary embeddings for long contexts, so that a row's angles depend on its position alone.

Two kinds of scaling in transformers change with the longest sequence that has been seen: `dynamic` stretches more the
longer it is, and `longrope` has one set of factors for short and one for long sequences. Either would tie a row to its
neighbours, and to keys that are in the cache already. Here the longest sequence that a run admits decides, once. A
sequence of just that length gets what transformers gives it; so does any other where the run stays within the length
that the model was trained for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SHIFTING = {"dynamic", "longrope"}
CHUNK = 1024  # positions whose angles are computed at a time


class Angles:
    """A rotary embedding, on a CPU as a table, which saves a pass of a few rows the dozen operations that make angles.

    The table grows with the positions there may be. A chunk always begins and ends at the same positions, as torch may round
    the last elements of a tensor otherwise than the rest. A GPU has none: a graph would go on reading one that has grown since.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._cos, self._sin = torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """x [T, W], whose dtype counts, positions int64 [T], all below `limit` -> cos, sin [T, R], of that dtype."""
        if x.device.type != "cpu":
            return self._computed(x, positions)
        if limit > len(self._cos):
            size = -(-max(limit, 2 * len(self._cos)) // CHUNK) * CHUNK
            chunks = [self._computed(x, chunk) for chunk in torch.arange(size).split(CHUNK)]
            self._cos, self._sin = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return self._cos[positions], self._sin[positions]

    def _computed(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(x[None], positions[None])
        return cos[0], sin[0]


def longest(config: PretrainedConfig) -> int:
    """Positions that the model knows, prompt and output together, with what its rotary scaling adds to them."""
    config = config.get_text_config()
    known: int = config.max_position_embeddings
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    if kind in ("linear", "dynamic", "proportional"):
        return int(known * factor)
    if kind == "yarn":  # some configs count the stretched positions already, others don't
        return max(known, int(rope.get("original_max_position_embeddings", known) * factor))
    return known


def settle(model: nn.Module, length: int) -> None:
    """Computes the frequencies of embeddings that shift with a sequence's length for this one, for good."""
    for module, prefix, kind, which in _rotary(model):
        if kind in SHIFTING:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, None, seq_len=length, **which)
            getattr(module, f"{prefix}inv_freq").copy_(frequencies)
            setattr(module, f"{prefix}attention_scaling", scaling)
            if which:
                module.rope_type[which["layer_type"]] = "settled"
            else:
                module.rope_type = "settled"


def _rotary(model: nn.Module) -> Iterator[tuple[Any, str, str, dict[str, str]]]:
    """Rotary embeddings: the module, what its buffers' names begin with, the kind, and which of its layer types it is."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            yield module, "", kinds, {}
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                yield module, f"{layer_type}_", kind, {"layer_type": layer_type}
