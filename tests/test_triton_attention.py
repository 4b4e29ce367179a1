"""The GPU's attention and cache against float64 and the reference, and a row has the same bits in any company."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.rows import EIGHT_BITS, cache_width
from tests.on_triton import DEVICE, DTYPES, HAS_GPU, MODULE, TABLE, gpu, needs_gpu, quiet, there
from tests.test_kernels import TOLERANCE, Case

from runtime.kernels.gpu import attention  # isort: skip

pytestmark = quiet


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_is_right_and_its_rows_are_alone(dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10 if HAS_GPU else 2):
        case = Case(rng, dtype)
        expected = case.exact(case.fill(reference))  # which is quicker than an interpreter; see below
        result = case.run(MODULE)
        assert result.dtype == dtype and result.shape == expected.shape
        assert (result.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max())
        count = len(case.rows)
        some = [rng.randrange(count) for _ in range(rng.randrange(1, count + 1))]
        assert torch.equal(case.run(MODULE, some), result[some])
        assert torch.equal(case.run(MODULE, some[:1]), result[some[:1]])


@pytest.mark.parametrize("window", [0, 600])
def test_long_contexts_are_merged_piece_by_piece(window: int, seed: int) -> None:
    """Three pieces, by a program each or by one for all; and a neighbour's longer sequence changes nothing."""
    torch.manual_seed(seed)
    lengths, kv, heads, dim, block = [1300, 700, 3], 1, 4, 16, 64
    table = torch.full((3, 40), -1, dtype=torch.int32)
    order = torch.randperm(40, dtype=torch.int32)
    table[0, :21], table[1, :11], table[2, :1] = order[:21], order[21:32], order[32:33]
    cache = torch.randn(2, 40, kv, block, dim)
    rows = torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32)
    positions = torch.tensor([1298, 1299, 511, 512, 699, 2], dtype=torch.int32)
    query, sinks = torch.randn(6, heads, dim), torch.randn(heads)

    def run(which: list[int], table: Tensor, programs: int) -> Tensor:
        spread = dataclasses.replace(TABLE, programs=programs)
        return there(attention.attend)(
            query[which], *cache, table, rows[which], positions[which], 0.25, window, 0.0, sinks, spread
        )  # fmt: skip

    whole = run(list(range(6)), table, 1)
    expected = reference.paged_attention(query, *cache, table, rows, positions, 0.25, window, 0.0, sinks)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(list(range(6)), table, 999), whole)
    for t in range(6):
        assert torch.equal(run([t], table[:, : lengths[rows[t]] // block + 1], 999 * (t % 2))[0], whole[t])


def test_a_neighbour_with_nan_harms_nobody(seed: int) -> None:
    torch.manual_seed(seed)
    cache = torch.randn(2, 2, 1, 16, 16)
    query = torch.randn(3, 4, 16)
    table, rows = torch.tensor([[1, 0]], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    positions = torch.tensor([17, 18, 19], dtype=torch.int32)

    def run() -> Tensor:
        return MODULE.paged_attention(query, cache[0], cache[1], table, rows, positions, 0.25)

    clean = run()
    for which in (slice(0, 2), slice(1, 2)):  # keys and values, values alone
        cache[which, 0, :, 3] = torch.nan  # position 19
        hurt = run()
        assert torch.equal(hurt[:2], clean[:2]) and bool(hurt[2].isnan().all())
    query[1] = torch.inf
    assert torch.equal(run()[0], clean[0]) and bool(run()[1].isnan().all())


def test_no_rows_and_rows_of_padding() -> None:
    cache, table = torch.randn(2, 1, 4, 8), torch.tensor([[0, 1]], dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int32)
    assert MODULE.paged_attention(torch.zeros(0, 2, 8), cache, cache, table, none, none, 1.0).shape == (0, 2, 8)
    padding = torch.tensor([-1, -1], dtype=torch.int32)
    result = MODULE.paged_attention(torch.ones(2, 2, 8), cache, cache, table, padding * 0, padding, 1.0)
    assert torch.equal(result, torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match="dtype"):
        MODULE.paged_attention(torch.ones(2, 2, 8).half(), cache, cache, table, padding, padding, 1.0)


@pytest.mark.parametrize("form", ["same", *EIGHT_BITS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cache_gets_what_the_reference_puts_there(dtype: torch.dtype, form: str, seed: int) -> None:
    """To the last byte, scales included, and of rows that aren't finite."""
    torch.manual_seed(seed)
    held = EIGHT_BITS.get(form, dtype)
    key, value = (torch.randn(2, 3, 9, 24) * 10 ** (torch.rand(9, 1) * 5 - 3)).to(dtype).transpose(1, 2)
    key[0, 1, 3], key[1, 0, 2], value[3] = torch.nan, torch.inf, 0.0
    ours, theirs = torch.zeros(2, 2, 5, 3, 4, cache_width(24, held) * held.itemsize, dtype=torch.uint8).view(held)
    slots = torch.randperm(20)[:9]
    slots[[2, 5]] = torch.tensor([-1, -7])
    MODULE.write_cache(key, value, *ours, slots)
    reference.write_cache(key, value, *theirs, slots)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    MODULE.write_cache(key[:0], value[:0], *ours, slots[:0])
    with pytest.raises(ValueError, match="slots"):
        MODULE.write_cache(key, value, *ours, slots.int())


@pytest.mark.gpu
@needs_gpu
def test_attention_is_alone_at_a_real_size(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv, heads, dim, block, sequences = 8, 32, 128, 16, 24
    lengths = [rng.randrange(1, 5000) for _ in range(sequences)]
    table = torch.randperm(sequences * 313, dtype=torch.int32).view(sequences, 313).to(DEVICE)
    keys, values = torch.randn(2, sequences * 313, kv, block, dim, device=DEVICE).bfloat16()
    pairs = [(r, p) for r, n in enumerate(lengths) for p in range(max(0, n - 6), n)]
    rows, positions = torch.tensor(pairs, dtype=torch.int32, device=DEVICE).t().contiguous()
    query = torch.randn(len(pairs), heads, dim, device=DEVICE).bfloat16()

    def run(which: list[int]) -> Tensor:
        return gpu.paged_attention(query[which], keys, values, table, rows[which], positions[which], dim**-0.5)

    whole = run(list(range(len(pairs))))
    for count in (1, 3, 30, 120, 600):
        which = [rng.randrange(len(pairs)) for _ in range(count)]
        assert torch.equal(run(which), whole[which])
