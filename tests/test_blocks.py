"""The pool of cache blocks: no block has two owners, none is lost."""

from __future__ import annotations

import random

import pytest

from runtime.blocks import BlockPool, OutOfBlocks, blocks_for


@pytest.mark.parametrize(("tokens", "size", "blocks"), [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2), (5, 1, 5)])
def test_blocks_for(tokens: int, size: int, blocks: int) -> None:
    assert blocks_for(tokens, size) == blocks


def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    pool, held = BlockPool(20), list[int]()
    for _ in range(2000):
        count = rng.randint(0, 8)
        if rng.random() < 0.5:
            rng.shuffle(held)
            back, held = held[:count], held[count:]
            pool.give_back(back)
        elif count <= 20 - len(held):
            held += pool.take(count)
        else:
            with pytest.raises(OutOfBlocks):
                pool.take(count)
        assert len(held) == len(set(held)) and set(held) <= set(range(20))
        assert pool.num_free == 20 - len(held)


def test_giving_back_twice_is_an_error() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    pool.give_back(blocks)
    with pytest.raises(ValueError, match="twice"):
        pool.give_back(blocks[:1])
    with pytest.raises(ValueError, match="twice"):
        pool.give_back([2])


def test_no_blocks() -> None:
    pool = BlockPool(0)
    assert pool.take(0) == []
    with pytest.raises(OutOfBlocks):
        pool.take(1)


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    assert pool.share(blocks) == blocks and pool.share(blocks[:1]) == blocks[:1]
    pool.give_back(blocks)
    assert pool.num_free == 1
    pool.give_back(blocks)
    assert pool.num_free == 2 and blocks[0] not in pool.take(2)
    pool.give_back(blocks[:1])
    assert pool.num_free == 1
    with pytest.raises(ValueError, match="free"):
        pool.share(blocks[:1])
