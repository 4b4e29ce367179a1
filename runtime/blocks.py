"""The blocks of a paged KV cache: which are free, which are held, and by how many."""

from __future__ import annotations


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""


class BlockPool:
    """Hands out the numbers 0 .. `size` - 1, and counts who holds each: a block is free once nobody does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # a stack whose top is the smallest number, at first
        self._holders = [0] * size

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks that nobody else holds. Raises OutOfBlocks, taking none."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} of {self.size} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> list[int]:
        """The same blocks, held by one more. Raises ValueError for one that is free."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1
        return list(blocks)

    def give_back(self, blocks: list[int]) -> None:
        """Lets go of blocks, once each. Raises ValueError for one that is free already."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"block {block} was given back twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // block_size)
