"""The GPU's choice of tokens: the same noise as everywhere, and the reference's tokens."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels import reference
from runtime.kernels.reference_sampling import cut
from runtime.noise import philox
from runtime.order import NONE, keys_of
from tests.on_triton import DTYPES, MODULE, quiet, there

import triton  # isort: skip
import triton.language as tl  # isort: skip

from runtime.kernels.gpu import sampling  # isort: skip

pytestmark = quiet


@triton.jit
def _words(tokens, positions, seeds, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    seed = tl.load(seeds + i)
    word = sampling._word(
        tl.load(tokens + i).to(tl.uint32), tl.load(positions + i).to(tl.uint32), seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    tl.store(out + i, word.to(tl.int64))


@triton.jit
def _logs(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, sampling._log(tl.load(x + i)))


def test_the_noise_has_the_same_words(seed: int) -> None:
    torch.manual_seed(seed)
    tokens, positions = torch.randint(0, 2**31, (2, 512))
    seeds = torch.randint(-(2**63), 2**63 - 1, (512,))
    zero = torch.zeros((), dtype=torch.int64)
    expected = philox((tokens, positions, zero, zero), (seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF))[0]
    out = torch.zeros_like(tokens)
    there(_words[(1,)])(tokens, positions, seeds, out, COUNT=512)
    assert torch.equal(out, expected)


def test_logarithms_are_right_where_the_best_noise_comes_from(seed: int) -> None:
    torch.manual_seed(seed)
    near_one = 1 - 2.0**-24 * torch.arange(1, 1025)
    x = torch.cat([near_one, torch.rand(1024) * 17 + 1e-7, 10 ** -(torch.rand(2048) * 7.2)]).float()
    out = torch.zeros_like(x)
    there(_logs[(1,)])(x, out, COUNT=4096)
    exact = x.double().log()
    assert bool(((out.double() - exact).abs() <= exact.abs() * 2.0**-22).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_tokens_are_the_reference_s(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    count, vocab = 20, 2100
    logits = (torch.randn(count, vocab + 9) * torch.exp(torch.rand(count, 1) * 5 - 2)).to(dtype)[:, :vocab]
    temperatures = torch.rand(count) * 1.9 + 0.1
    temperatures[::4] = 0
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (count,)), torch.randint(0, 5000, (count,))
    logits[5] = -torch.inf
    logits[6:8] = -torch.inf
    logits[6:8, 2000] = 0.0
    logits[8, [2050, 1100, 1090]] = 200.0  # greedy, a tie
    logits[9, 17] = logits[12, 2000] = torch.nan
    arguments = logits, temperatures, seeds, positions, 77
    scores, ids = MODULE.best_tokens(*arguments)
    best, expected = reference.best_tokens(*arguments)
    whole = ~best.isnan()
    assert torch.equal(scores.isnan(), best.isnan()) and scores[whole].dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.allclose(scores[whole], best[whole], rtol=1e-6, atol=1e-5)
    assert ids[6] == ids[7] == 2077 and ids[8] == 1167
    assert int((ids[whole] != expected[whole]).sum()) <= 1 and torch.equal(ids[0:1], expected[0:1])
    one = [3, 9]
    alone = [MODULE.best_tokens(*(a[i : i + 1] for a in arguments[:4]), 77) for i in one]
    assert torch.equal(torch.cat([s for s, _ in alone]).nan_to_num(), scores[one].nan_to_num())
    assert torch.equal(torch.cat([i for _, i in alone]), ids[one])
    cuts = [(0, 700), (700, 2100)]
    parts = [MODULE.best_tokens(logits[:, a:b], temperatures, seeds, positions, 77 + a)[0] for a, b in cuts]
    assert torch.equal(torch.maximum(*parts)[whole], scores[whole])
    assert [x.shape for x in MODULE.best_tokens(*(a[:0] for a in arguments[:4]), 0)] == [(0,), (0,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_are_the_reference_s(dtype: torch.dtype, seed: int) -> None:
    """Ties within a tile and over two, rows that are forbidden, infinite or not a number, slices shorter than the list."""
    torch.manual_seed(seed)
    rows, vocab = 7, 150
    logits = (torch.randn(rows, vocab + 3) * torch.exp(torch.rand(rows, 1) * 4 - 2)).to(dtype)[:, :vocab]
    logits[1] = torch.round(logits[1])
    logits[2, 10:] = -torch.inf
    logits[3] = -torch.inf
    logits[4, [5, 140]] = torch.inf
    logits[5, 130] = torch.nan
    temperatures = torch.rand(rows) * 1.5 + 0.1
    temperatures[6] = 0.0
    listed = there(sampling.listed)  # sorting takes the interpreter long, and a thousand tokens forty times as long as 64
    for count in (1, 40, 200):
        keys = listed(logits, temperatures, count, 77, 64)
        assert keys.shape == (rows, count) and torch.equal(keys, reference.candidates(logits, temperatures, count, 77))
    assert (keys[:, vocab:] == NONE).all()
    assert torch.equal(listed(logits[1:2], temperatures[1:2], 40, 77, 64), keys[1:2, :40])
    assert MODULE.candidates(logits[:0], temperatures[:0], 5, 0).shape == (0, 5)
    if dtype == torch.bfloat16:
        assert torch.equal(MODULE.candidates(logits[1:2], temperatures[1:2], 40, 77), keys[1:2, :40])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masses_are_the_reference_s(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    rows, vocab = 7, 2100
    logits = (torch.randn(rows, vocab + 3) * torch.exp(torch.rand(rows, 1) * 4 - 2)).to(dtype)[:, :vocab]
    logits[2, 10:] = logits[3] = -torch.inf
    logits[4, 2000] = torch.inf
    logits[5, [0, 1050]] = torch.nan
    temperatures = torch.rand(rows) * 1.5 + 0.1
    temperatures[6] = 0.0
    found = MODULE.masses(logits, temperatures)
    torch.testing.assert_close(found, reference.masses(logits, temperatures), rtol=1e-13, atol=0)
    assert found[3] == found[4] == 0 and found[5] >= 1
    for which in ([1], [6, 2, 5, 2]):
        assert torch.equal(MODULE.masses(logits[which], temperatures[which]), found[which])
    assert MODULE.masses(logits[:0], temperatures[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_a_cut_leaves_can_win(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    rows, vocab, first = 6, 1100, 50
    logits = (torch.randn(rows, vocab) * 2).to(dtype)
    logits[4, 1060] = torch.nan
    temperatures = torch.rand(rows) + 0.5
    temperatures[5] = 0.0
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 5000, (rows,))
    cuts = reference.candidates(logits, temperatures, 9, first)[:, 8].clone()
    cuts[2], cuts[3] = NONE, keys_of(torch.tensor(torch.inf), torch.tensor(0))  # everything is left, and nothing
    scores, ids = MODULE.best_tokens(logits, temperatures, seeds, positions, first, cuts)
    masked = cut(logits, temperatures, cuts, first)
    assert (masked[[0, 1, 5]] > -torch.inf).sum(1).tolist() == [9, 9, 9]
    wanted, winners = MODULE.best_tokens(masked, temperatures, seeds, positions, first)
    assert torch.equal(scores.nan_to_num(), wanted.nan_to_num()) and torch.equal(scores.isnan(), wanted.isnan())
    assert scores[4].isnan() and scores[3] == -torch.inf
    good = [0, 1, 2, 5]
    assert torch.equal(ids[good], winners[good])
