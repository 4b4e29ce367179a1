"""The keys and values of all running sequences, in blocks that anyone may own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.kernels.rows import EIGHT_BITS, cache_width
from runtime.pages import Pages


class CacheShape(NamedTuple):
    """What a model keeps of a token on one rank: a key and a value of head_dim for each layer and KV head."""

    layers: int
    kv_heads: int
    head_dim: int


def held_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What `engine.kv_cache_dtype` means for a model of this dtype."""
    return EIGHT_BITS.get(name, dtype)


class KVCache:
    """Per layer one tensor of keys and one of values, [num_blocks, KV heads of this rank, block_size, head_dim].

    In eight bits a row is four bytes longer and ends in its scale; see `runtime/kernels/rows.py`.

    Blocks are only numbers here; `runtime.blocks` hands them out. A rollback writes nothing: what lies behind a
    sequence's computed tokens is never read.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = CacheShape(*shape)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        width = cache_width(self.shape.head_dim, dtype)
        size = (self.shape.layers, num_blocks, self.shape.kv_heads, block_size, width)
        # Zeros touch the memory now, so that too large a cache fails at the start and not in the middle of a job.
        pages = Pages()
        self.keys: tuple[Tensor, ...] = pages.empty(size, dtype, self.device).zero_().unbind()
        self.values: tuple[Tensor, ...] = pages.empty(size, dtype, self.device).zero_().unbind()

    @staticmethod
    def bytes_per_block(shape: CacheShape, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        return 2 * shape.layers * shape.kv_heads * block_size * cache_width(shape.head_dim, dtype) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.bytes_per_block(self.shape, self.block_size, self.dtype)
