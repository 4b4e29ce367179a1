"""The GPU's products of sixteen and eight bits, and the head's choice, which is that of its logits to the bit."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from runtime.kernels import reference
from runtime.quantize import int8
from tests.on_triton import DEVICE, DTYPES, MODULE, TABLE, gpu, needs_gpu, quiet, there

from runtime.kernels.gpu import dense  # isort: skip

pytestmark = quiet


def aligned(weight: Tensor) -> Tensor:
    """A copy that begins where products want it."""
    return torch.empty(weight.numel() + 64, dtype=weight.dtype)[: weight.numel()].view(weight.shape).copy_(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_near_the_exact_ones(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    for rows, outputs, inputs in ((1, 1, 1), (5, 70, 1100), (17, 130, 96)):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        exact = x.double() @ weight.double().t()
        room = x.double().abs() @ weight.double().abs().t() * 2e-6 + torch.finfo(dtype).eps * exact.abs()
        found = MODULE.dense_linear(x, weight)
        assert found.dtype == dtype and bool(((found.double() - exact).abs() <= room).all())
    assert MODULE.dense_linear(x[:0], weight).shape == (0, 130)


def test_a_row_of_a_product_is_alone_however_the_work_is_spread(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    x, weight = torch.randn(70, 2100).bfloat16(), torch.randn(66, 2100).bfloat16()

    def run(which: list[int], programs: int, outputs: int) -> Tensor:
        tiles = {rows: dataclasses.replace(tile, outputs=outputs) for rows, tile in TABLE.dense.items()}
        table = dataclasses.replace(TABLE, programs=programs, dense=tiles)
        return there(dense.multiply)(x[which], weight, None, None, torch.bfloat16, table)

    whole = run(list(range(70)), 1, 64)
    for count, programs, outputs in ((1, 1, 64), (1, 999, 64), (9, 999, 128), (20, 1, 64), (40, 999, 64)):
        which = [rng.randrange(70) for _ in range(count)]
        assert torch.equal(run(which, programs, outputs), whole[which]), (count, programs, outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bit_products_are_the_reference_s(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    for rows, outputs, inputs in ((1, 5, 3), (3, 70, 200)):
        x = (torch.randn(rows, inputs) * 10 ** (torch.rand(rows, 1) * 4 - 2)).to(dtype)
        packed = reference.pack_int8(int8.quantize(torch.randn(outputs, inputs)))
        assert torch.equal(MODULE.int8_linear(x, packed), reference.int8_linear(x, packed))
    x[1, 7] = torch.nan
    assert bool(MODULE.int8_linear(x, packed)[1].isnan().all()) and not MODULE.int8_linear(x, packed)[2].isnan().any()


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head_chooses_what_its_logits_would(dtype: torch.dtype, eight: bool, seed: int) -> None:
    """In tiles of the vocabulary, greedy and sampled, with ties and a row that is NaN; alone and in a batch."""
    torch.manual_seed(seed)
    rows, vocab, width, first = 17, 150, 40, 1000
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(vocab, width)
    weight[[20, 140]] = weight[70] = 3.0
    x[4] = 1.0
    x[9, 3] = torch.nan
    held = reference.pack_int8(int8.quantize(weight)) if eight else aligned(weight.to(dtype))
    temperatures = torch.rand(rows) * 1.5 + 0.2
    temperatures[[0, 4, 11]] = 0
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 5000, (rows,))

    def run(which: list[int]) -> tuple[Tensor, Tensor]:
        return MODULE.head_best(x[which], held, temperatures[which], seeds[which], positions[which], first)

    scores, ids = run(list(range(rows)))
    logits = MODULE.int8_linear(x, held) if eight else MODULE.dense_linear(x, held)
    wanted = MODULE.best_tokens(logits, temperatures, seeds, positions, first)
    assert torch.equal(scores.nan_to_num(-1e9), wanted[0].nan_to_num(-1e9)) and scores[9].isnan()
    good = ~scores.isnan()
    assert torch.equal(ids[good], wanted[1][good]) and ids[4] == first + 20
    for which in ([4], [2, 16, 2, 5]):
        found = run(which)
        assert torch.equal(found[0], scores[which]) and torch.equal(found[1], ids[which])
    assert [len(part) for part in run([])] == [0, 0]
    theirs, _ = reference.head_best(x, held, temperatures, seeds, positions, first)
    room = 1e-4 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps * weight.norm(dim=1).max()
    assert bool(((scores - theirs)[good].abs() <= room / temperatures.clamp(min=0.2)[good]).all())


@pytest.mark.gpu
@needs_gpu
def test_the_head_chooses_what_its_logits_would_at_a_real_size(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    x, weight = torch.randn(96, 4096, device=DEVICE).bfloat16(), torch.randn(151936, 4096, device=DEVICE).bfloat16() / 64
    temperatures = torch.rand(96, device=DEVICE).where(torch.rand(96, device=DEVICE) < 0.7, 0.0)
    seeds, positions = torch.randint(0, 2**62, (2, 96), device=DEVICE)
    scores, ids = gpu.head_best(x, weight, temperatures, seeds, positions % 9999, 0)
    wanted = gpu.best_tokens(gpu.dense_linear(x, weight), temperatures, seeds, positions % 9999, 0)
    assert torch.equal(scores, wanted[0]) and torch.equal(ids, wanted[1])
    for count in (1, 6, 17, 33, 64, 65):
        which = [rng.randrange(96) for _ in range(count)]
        found = gpu.head_best(x[which], weight, temperatures[which], seeds[which], positions[which] % 9999, 0)
        assert torch.equal(found[0], scores[which]) and torch.equal(found[1], ids[which]), count
