"""What one forward pass is about: which tokens, where they stand, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence.

    start: position of the first; blocks: the sequence's cache blocks in order of position, up to the last token at
    least; num_logits: the last so many tokens want logits.
    """

    tokens: Sequence[int]
    start: int
    blocks: list[int]
    num_logits: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The pieces laid end to end: T tokens of R sequences, of which L want logits.

    tokens, positions: int64 [T]. reach: int32 [T], the positions again, as attention kernels read them.
    rows: int32 [T], a token's sequence, as an index into tables. tables: int32 [R, MB], the blocks of each sequence,
    filled up with -1. slots: int64 [T], block * block_size + offset, where a token's key and value go.
    logits_at: int64 [L], indices of tokens.
    """

    tokens: Tensor
    positions: Tensor
    reach: Tensor
    rows: Tensor
    tables: Tensor
    slots: Tensor
    logits_at: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, pieces: Sequence[Piece], block_size: int, device: torch.device | str = "cpu") -> Batch:
        """Lays the pieces out. Raises ValueError for no tokens, too few blocks, or more logits than tokens."""
        counts = np.array([len(piece.tokens) for piece in pieces], np.int64)
        starts = np.array([piece.start for piece in pieces], np.int64)
        wanted = np.array([piece.num_logits for piece in pieces], np.int64)
        held = np.array([len(piece.blocks) for piece in pieces], np.int64)
        if not len(pieces) or counts.min() < 1:
            raise ValueError("a batch has pieces, and every piece has tokens")
        if starts.min() < 0 or wanted.min() < 0 or (wanted > counts).any():
            raise ValueError("a piece starts at 0 or later and wants logits of its own tokens only")
        last = starts + counts - 1
        if (short := last // block_size >= held).any():
            bad = int(np.argmax(short))
            raise ValueError(f"piece {bad} reaches position {last[bad]}, its {held[bad]} blocks of {block_size} don't")

        ends = np.cumsum(counts)
        rows = np.repeat(np.arange(len(pieces), dtype=np.int32), counts)
        tokens = np.fromiter((token for piece in pieces for token in piece.tokens), np.int64, int(ends[-1]))
        # A token's place in the batch plus its piece's own shift.
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        tables = np.full((len(pieces), held.max()), -1, np.int32)
        for table, piece in zip(tables, pieces, strict=True):
            table[: len(piece.blocks)] = piece.blocks
        slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
        firsts = np.cumsum(wanted) - wanted
        logits_at = np.arange(wanted.sum()) + np.repeat(ends - wanted - firsts, wanted)

        arrays = (tokens, positions, positions.astype(np.int32), rows, tables, slots, logits_at)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))
