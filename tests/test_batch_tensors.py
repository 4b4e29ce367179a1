"""What a forward pass is told, and where it puts keys and values."""

import random
from dataclasses import fields

import pytest
import torch

from runtime.batch import Batch, Piece
from runtime.kv_cache import CacheShape, KVCache


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [getattr(batch, field.name) for field in fields(batch)]


def test_two_pieces_by_hand() -> None:
    batch = Batch.build([Piece([7, 8, 9], 3, [5, 2], 2), Piece([4], 0, [6], 0)], 4)
    assert batch.tokens.tolist() == [7, 8, 9, 4]
    assert batch.positions.tolist() == batch.reach.tolist() == [3, 4, 5, 0]
    assert batch.rows.tolist() == [0, 0, 0, 1]
    assert batch.tables.tolist() == [[5, 2], [6, -1]]
    assert batch.slots.tolist() == [23, 8, 9, 24]
    assert batch.logits_at.tolist() == [1, 2]
    assert batch.num_tokens == 4
    assert [t.dtype for t in (batch.tokens, batch.positions, batch.slots, batch.logits_at)] == [torch.int64] * 4
    assert [t.dtype for t in (batch.reach, batch.rows, batch.tables)] == [torch.int32] * 3


def test_against_plain_loops(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        size = rng.choice([8, 16, 32])
        free = rng.sample(range(100), 100)
        pieces = []
        for _ in range(rng.randint(1, 9)):
            start, count = rng.randint(0, 40), rng.randint(1, 30)
            blocks = [free.pop() for _ in range(-(-(start + count) // size) + rng.randint(0, 1))]
            pieces.append(Piece([rng.randrange(1000) for _ in range(count)], start, blocks, rng.randint(0, count)))
        batch = Batch.build(pieces, size)
        assert all(x.storage_offset() * x.itemsize % 16 == 0 and x.is_contiguous() for x in tensors(batch))
        rows, wanted = [], []
        for index, piece in enumerate(pieces):
            for place, token in enumerate(piece.tokens):
                if place >= len(piece.tokens) - piece.num_logits:
                    wanted.append(len(rows))
                position = piece.start + place
                slot = piece.blocks[position // size] * size + position % size
                rows.append((token, position, position, index, slot))
        found = zip(*(x.tolist() for x in (batch.tokens, batch.positions, batch.reach, batch.rows, batch.slots)), strict=True)
        assert list(found) == rows
        assert batch.logits_at.tolist() == wanted
        for table, piece in zip(batch.tables.tolist(), pieces, strict=True):
            assert table == piece.blocks + [-1] * (len(table) - len(piece.blocks))


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [Piece([], 0, [1], 0)],
        [Piece([1], -1, [1], 0)],
        [Piece([1, 2], 0, [1], 3)],
        [Piece([1, 2], 0, [1], -1)],
        [Piece([1, 2], 7, [1], 0)],
        [Piece([1], 0, [1], 1), Piece([1], 8, [2], 1)],
    ],
)
def test_what_cannot_be_is_refused(pieces: list[Piece]) -> None:
    with pytest.raises(ValueError):
        Batch.build(pieces, 8)


def test_cache_has_the_size_it_says() -> None:
    shape = CacheShape(layers=3, kv_heads=2, head_dim=16)
    cache = KVCache(shape, 5, 8, torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == 3
    assert all(x.shape == (5, 2, 8, 16) and x.is_contiguous() for x in (*cache.keys, *cache.values))
    assert cache.nbytes == sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert KVCache.bytes_per_block(shape, 8, torch.bfloat16) * 5 == cache.nbytes
    assert cache.device == torch.device("cpu") and cache.block_size == 8 and cache.num_blocks == 5
