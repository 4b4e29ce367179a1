"""What one forward pass is about: which tokens, where they stand, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNED = 4  # numbers, of four bytes or eight


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
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logits_at: list[int] = []
        rows: list[int] = []
        tables: list[int] = []
        longest = max((len(piece.blocks) for piece in pieces), default=0)
        for row, piece in enumerate(pieces):
            count, start, blocks = len(piece.tokens), piece.start, piece.blocks
            stop = start + count
            if count < 1 or start < 0 or not 0 <= piece.num_logits <= count:
                raise ValueError("a piece has tokens, starts at 0 or later, and wants logits of its own tokens only")
            if stop > len(blocks) * block_size:
                raise ValueError(f"piece {row} reaches position {stop - 1}, its {len(blocks)} blocks of {block_size} don't")
            tokens += piece.tokens
            positions += range(start, stop)
            rows += [row] * count
            logits_at += range(len(tokens) - piece.num_logits, len(tokens))
            for number in range(start // block_size, (stop - 1) // block_size + 1):
                first, shift = number * block_size, (blocks[number] - number) * block_size
                slots += range(max(start, first) + shift, min(stop, first + block_size) + shift)
            tables += blocks
            tables += [-1] * (longest - len(blocks))
        if not tokens:
            raise ValueError("a batch has pieces")
        wide = _tensors(np.int64, device, tokens, positions, slots, logits_at)
        narrow = _tensors(np.int32, device, positions, rows, tables)
        return cls(
            tokens=wide[0],
            positions=wide[1],
            reach=narrow[0],
            rows=narrow[1],
            tables=narrow[2].view(len(pieces), longest),
            slots=wide[2],
            logits_at=wide[3],
        )


def _tensors(dtype: type[np.integer], device: torch.device | str, *lists: list[int]) -> list[Tensor]:
    """Lists as tensors on a device that share one array, as each array takes a while, on its way to a GPU above all. Each
    begins at a multiple of 16 bytes, which a GPU's kernels are compiled for."""
    numbers: list[int] = []
    starts = []
    for each in lists:
        starts.append(len(numbers))
        numbers += each
        numbers += [0] * (-len(each) % ALIGNED)
    whole = torch.from_numpy(np.fromiter(numbers, dtype, len(numbers))).to(device)
    return [whole[start : start + len(each)] for start, each in zip(starts, lists, strict=True)]
