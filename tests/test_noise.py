"""The keyed noise: the generator against published vectors and plain integers, the noise against its distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from runtime.noise import LARGEST, SMALLEST, SPREAD, gumbel, philox

pytestmark = pytest.mark.usefixtures("one_thread")

MASK = 0xFFFFFFFF
FALSE_ALARM = 1e-4  # of each statistical test, whose seeds are fresh

VECTORS = [  # counter, key, result: the known answers that come with Random123
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


def reference(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 on Python's integers."""
    a, b, c, d = counter
    x, y = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ x, q & MASK, (p >> 32) ^ d ^ y, p & MASK
        x, y = (x + 0x9E3779B9) & MASK, (y + 0xBB67AE85) & MASK
    return a, b, c, d


def uniform_reference(seed: int, position: int, token: int) -> float:
    word = reference((token, position, 0, 0), (seed & MASK, (seed >> 32) & MASK))[0]
    return ((word >> 9) + 0.5) / 2**23


def draw(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random seeds (of all 64 bits), positions and tokens, none of them 0 so that each has a neighbour on both sides."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    positions = torch.randint(1, 2**20, (count,), generator=generator)
    tokens = torch.randint(1, 2**18, (count,), generator=generator)
    return seeds, positions, tokens


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == result
    assert reference(counter, key) == result


def test_philox_is_the_integer_reference(seed: int) -> None:
    counters = np.random.default_rng(seed).integers(0, 2**32, (500, 6), dtype=np.int64)
    columns = [torch.from_numpy(counters[:, i].copy()) for i in range(6)]
    result = torch.stack(philox(tuple(columns[:4]), tuple(columns[4:])), dim=1).tolist()
    for row, expected in zip(result, counters.tolist(), strict=True):
        assert tuple(row) == reference(tuple(expected[:4]), tuple(expected[4:]))


def test_gumbel_is_the_float64_value_rounded(seed: int) -> None:
    seeds, positions, tokens = draw(seed, 2000)
    noise = gumbel(seeds, positions, tokens)
    assert noise.dtype == torch.float32
    for s, p, t, value in zip(seeds.tolist(), positions.tolist(), tokens.tolist(), noise.tolist(), strict=True):
        exact = -math.log(-math.log(uniform_reference(s, p, t)))
        # Each logarithm is off by a unit or two in the last place; the outer one turns relative errors into absolute ones.
        assert abs(value - exact) <= 2**-21 + abs(exact) * 2**-21


def test_noise_of_a_place_has_the_same_bits_wherever_it_is_computed(seed: int) -> None:
    seeds, positions, tokens = draw(seed, 1003)
    whole = gumbel(seeds, positions, tokens)
    for at in (0, 1, 500, 1002):
        assert torch.equal(gumbel(seeds[at], positions[at], tokens[at]), whole[at])
    assert torch.equal(gumbel(seeds[3:], positions[3:], tokens[3:]), whole[3:])
    table = gumbel(seeds[:, None], positions[:, None], tokens[None, :7])
    assert table.shape == (1003, 7)
    assert torch.equal(table[:, 5], gumbel(seeds, positions, tokens[5]))


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, bound in ((0, SMALLEST), (MASK, LARGEST)):
        extreme = torch.tensor([word])
        monkeypatch.setattr("runtime.noise.philox", lambda counter, key, extreme=extreme: (extreme,))
        noise = gumbel(*words(0, 0, 0)).item()
        assert math.isfinite(noise)
        assert noise == pytest.approx(bound, abs=1e-5)
    assert LARGEST - SMALLEST < SPREAD < LARGEST - SMALLEST + 0.01


def test_noise_stays_within_its_bounds(seed: int) -> None:
    noise = gumbel(*draw(seed, 100_000))
    assert noise.min() >= SMALLEST - 1e-5 and noise.max() <= LARGEST + 1e-5


@pytest.mark.parametrize("varied", ["seeds", "positions", "tokens"])
def test_gumbel_distribution(varied: str, seed: int) -> None:
    """Kolmogorov-Smirnov along each argument with the others fixed. Fails falsely once in 1 / FALSE_ALARM runs."""
    arguments = [value[:1] for value in draw(seed, 1)]
    count = 40_000
    along = torch.arange(count) + int(arguments[1])
    arguments[["seeds", "positions", "tokens"].index(varied)] = along
    assert stats.kstest(gumbel(*arguments).numpy(), "gumbel_r").pvalue > FALSE_ALARM


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 1, -1), (1, -1, 0)])
def test_neighbours_are_independent(step: tuple[int, int, int], seed: int) -> None:
    """Correlation of the uniforms at places one step apart; sqrt(n) times it is close to a standard normal."""
    places = draw(seed, 40_000)
    here = torch.exp(-torch.exp(-gumbel(*places).double()))
    there = torch.exp(-torch.exp(-gumbel(*(place + by for place, by in zip(places, step, strict=True))).double()))
    z = np.corrcoef(here, there)[0, 1] * math.sqrt(len(here))
    assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM


def test_the_whole_seed_counts() -> None:
    """A key of which a half were ignored would pass the tests of distribution."""
    positions, tokens = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    seeds = torch.tensor([1 << bit if bit < 63 else -(2**63) for bit in range(64)])
    assert len(set(gumbel(seeds, positions, tokens).tolist())) == 64
