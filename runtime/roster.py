"""What a device knows of the sequences that run on it: a row of numbers for each, and the tokens of each.

The host keeps the rows as it would send them, and changes in them what has changed; one copy brings those of a round. Tokens
that rounds write on the device come from nowhere else. No copy waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.blocks import blocks_for
from runtime.filters import limits_of
from runtime.kv_cache import KVCache
from runtime.pinned import pinned
from runtime.sequence import Sequence
from runtime.verify import Ints

ENDS = 8  # end tokens of a sequence; one with more runs on the host
ABSENT = -1
# Of a row; then ends, allowances, blocks. Temperatures are the bits of float32, what limits are those of float64.
COLUMNS = ("slot", "length", "limit", "room", "seed", "temperature", "live", "top_k", "top_p", "log_min_p")
LENGTH, ROOM, LIVE = (COLUMNS.index(name) for name in ("length", "room", "live"))


@dataclass(slots=True)
class Told:
    """What the device has of a slot's sequence: how many of its tokens, its blocks and its allowance."""

    sequence: Sequence
    count: int
    blocks: list[int]
    allowance: list[int]


class Roster:
    """Sequences by slot. history: int32 [slots + 1, N + 1], their tokens; the last of each is for no one.

    sources: of drafts. slots: sequences at most; most: rows of a round at most, those of padding among them; longest: tokens
    of a sequence at most.
    """

    def __init__(self, cache: KVCache, sources: int, slots: int, most: int, longest: int) -> None:
        self._block_size, self.device, self.most = cache.block_size, cache.device, most
        self.most_blocks = power(blocks_for(longest, cache.block_size))
        self._sources, self._facts = sources, len(COLUMNS) + ENDS + 1 + sources  # what stands before a row's blocks
        places = self.most_blocks * cache.block_size
        self.history = torch.zeros(slots + 1, places + 1, dtype=torch.int32, device=self.device)
        self._state = torch.zeros(most * (self._facts + self.most_blocks), dtype=torch.int64, device=self.device)
        self._rows = np.full((slots + 1, self._facts + self.most_blocks), ABSENT, np.int64)  # the last is nobody's
        self._rows[:, : len(COLUMNS)] = 0
        self._rows[:, 0] = np.arange(slots + 1)
        self._told: dict[int, Told] = {}

    def __getitem__(self, slot: int) -> Sequence:
        return self._told[slot].sequence

    def table(self, rows: int, blocks: int) -> Tensor:
        """int64 [rows, facts and blocks], what a round of this shape knows: one piece of memory, which stays where it is."""
        width = self._facts + blocks
        return self._state[: rows * width].view(rows, width)

    def split(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A table's ends, its allowances by source, 0 among them, and its blocks."""
        ends, allowances, blocks = table[:, len(COLUMNS) :].split([ENDS, 1 + self._sources, table.shape[1] - self._facts], 1)
        return ends, allowances, blocks

    def tell(self, sequence: Sequence) -> list[int]:
        """Brings a sequence's row up to date. Returns its last tokens, which no round has written here; see `write`."""
        told, row = self._told.get(sequence.slot), self._rows[sequence.slot]
        if told is None or told.sequence is not sequence:
            told = self._told[sequence.slot] = Told(sequence, 0, [], [])
            asked = sequence.sampling
            top_k, *floats = limits_of(asked)
            row[: len(COLUMNS)] = (
                sequence.slot, 0, sequence.limit, 0, asked.seed, np.float32(asked.temperature).view(np.int32), 1, top_k,
                *np.array(floats, np.float64).view(np.int64),
            )  # fmt: skip
            row[len(COLUMNS) :] = ABSENT
            row[len(COLUMNS) : len(COLUMNS) + len(sequence.ends)] = sorted(sequence.ends)
            row[self._facts - self._sources - 1 : self._facts] = 0
        if told.blocks != sequence.blocks:
            told.blocks = list(sequence.blocks)
            row[self._facts :] = ABSENT
            row[self._facts : self._facts + len(told.blocks)] = told.blocks
            row[ROOM] = len(told.blocks) * self._block_size
        if told.allowance != sequence.allowance:
            told.allowance = list(sequence.allowance)
            row[self._facts - len(told.allowance) : self._facts] = told.allowance
        tail = sequence.tokens[told.count :]
        row[LENGTH] = told.count = sequence.num_committed
        return tail

    def written(self, slot: int, count: int) -> None:
        """A round has written so many tokens more of the slot's sequence, as the host is about to hear."""
        self._told[slot].count += count

    def write(self, tails: list[tuple[Sequence, list[int]]]) -> None:
        """Puts the last tokens of sequences in their places."""
        new, first = pinned((sum(len(tail) for _, tail in tails),), torch.int32, self.device), 0
        for sequence, tail in tails:
            part, stop = new[first : first + len(tail)], sequence.num_committed
            part.numpy()[:] = tail
            self.history[sequence.slot, stop - len(tail) : stop].copy_(part, non_blocking=True)
            first += len(tail)

    def bring(self, slots: Ints, blocks: int) -> None:
        """Sends the rows of these slots, int32 [rows], where ABSENT is nobody's, into the table of that shape."""
        table = self.table(len(slots), blocks)
        rows = pinned(tuple(table.shape), table.dtype, self.device)
        rows.numpy()[:] = self._rows[slots, : table.shape[1]]  # ABSENT is the last
        table.copy_(rows, non_blocking=True)


def power(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()
