"""transformers' attention over our cache."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from runtime.batch import Batch
from runtime.checkpoint import ModelError
from runtime.kv_cache import KVCache
from runtime.llama4 import take_over_tuning
from runtime.shard import HeadShare
from runtime.skeleton import ATTENTION


@dataclass(frozen=True)
class Spread:
    """Where a rank's query heads lie so that equally many of them read each of its KV heads, as kernels want it.

    places: int64 [H], of each head. heads: int64 [KV * most], the head in each place, or any where nobody reads the result.
    """

    places: Tensor
    heads: Tensor

    @classmethod
    def of(cls, share: HeadShare, queries_per_key: int) -> Spread:
        owners = [head // queries_per_key - share.keys.start for head in range(*share.queries)]
        most = max(owners.count(key) for key in owners)
        places = [most * key + owners[:head].count(key) for head, key in enumerate(owners)]
        heads = torch.zeros(most * share.keys.width, dtype=torch.int64)
        heads[places] = torch.arange(len(places))
        return cls(torch.tensor(places), heads)

    def to(self, device: torch.device) -> Spread:
        return Spread(self.places.to(device), self.heads.to(device))


def attends(module: nn.Module) -> bool:
    """Whether a module is one that calls attention; MLPs may know their layer's index too."""
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")


Reading = tuple[Tensor, Tensor, Tensor]  # tables, and each token's row of them and its position


class Pass:
    """The forward pass under way. Every attention module of a model has it as `under_way`: transformers' layers call
    them, and not all layers hand on arguments that aren't their own."""

    batch: Batch
    cache: KVCache
    kernels: ModuleType

    def __init__(self, model: PreTrainedModel) -> None:
        self._written: set[int] = set()
        self._chunks: dict[int, Reading] = {}
        config = model.config.get_text_config()
        types = getattr(config, "layer_types", None)
        for module in model.modules():
            if attends(module):
                module.under_way = self  # type: ignore[assignment]
                if types and types[module.layer_idx] == "chunked_attention":
                    module.chunk = config.attention_chunk_size
                if getattr(module, "attn_temperature_tuning", False):
                    take_over_tuning(module, config.max_position_embeddings, next(model.parameters()).device)

    def run(self, model: PreTrainedModel, batch: Batch, cache: KVCache, kernels: ModuleType) -> Tensor:
        """transformers' own forward of the whole model: logits [L, this rank's vocabulary]."""
        self.begin(batch, cache, kernels)
        output = model(
            batch.tokens[None], position_ids=batch.positions[None], use_cache=False, logits_to_keep=batch.logits_at
        )
        logits: Tensor = output.logits[0]
        return logits

    def begin(self, batch: Batch, cache: KVCache, kernels: ModuleType) -> None:
        self.batch, self.cache, self.kernels = batch, cache, kernels
        self._written.clear()
        self._chunks.clear()

    def reading(self, chunk: int) -> Reading:
        """What kernels read of the batch where nobody looks back beyond its own chunk of so many positions, 0 for no such
        bound. Each chunk is a sequence of its own to them. Raises ModelError where chunks cut blocks."""
        batch, size = self.batch, self.cache.block_size
        if not chunk:
            return batch.tables, batch.rows, batch.reach
        if chunk not in self._chunks:
            if chunk % size:
                raise ModelError(f"attention in chunks of {chunk} positions: engine.block_size must divide it, and is {size}")
            each = chunk // size
            tables = functional.pad(batch.tables, (0, -batch.tables.shape[1] % each), value=-1)
            first = batch.rows * (tables.shape[1] // each)
            inside = batch.reach.clamp(min=0)  # rows of padding have a negative one
            self._chunks[chunk] = (
                tables.reshape(-1, each), first + inside // chunk, torch.where(batch.reach < 0, batch.reach, inside % chunk)
            )
        return self._chunks[chunk]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes keys and values [T, KV, D] into a layer's cache. Raises ModelError for a second time in one pass."""
        if layer in self._written:
            raise ModelError(f"layer {layer} attends twice, and has one place in the cache")
        self._written.add(layer)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        self.kernels.write_cache(key, value, keys, values, self.batch.slots)
        return keys, values


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function over our cache: query [1, H, T, D], key and value [1, KV, T, D] -> [1, T, H, D].

    Heads narrower than the cache's are filled up with zeros, such as values that are shorter than keys. A module whose
    heads don't fall evenly on the ranks has a `spread`.
    """
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} asks for another mask than the causal one")
    current: Pass = module.under_way  # type: ignore[assignment]
    batch, wide, dim = current.batch, current.cache.shape.head_dim, value.shape[-1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    queries, key, value = (_widened(x[0].transpose(0, 1), wide) for x in (query, key, value))
    spread: Spread | None = getattr(module, "spread", None)
    if spread is not None:
        queries = queries[:, spread.heads]
        s_aux = None if s_aux is None else s_aux[spread.heads]
    if hasattr(module, "tuning"):
        queries = module.tuning(queries, batch.positions)  # type: ignore[operator]
    keys, values = current.write(module.layer_idx, key, value)  # type: ignore[arg-type]
    tables, rows, reach = current.reading(getattr(module, "chunk", 0))
    out = current.kernels.paged_attention(
        queries, keys, values, tables, rows, reach, scale, sliding_window or 0, softcap or 0.0, s_aux
    )
    if spread is not None:
        out = out[:, spread.places]
    return out[None, ..., :dim], None


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


AttentionInterface.register(ATTENTION, attend)
