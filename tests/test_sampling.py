"""The rule that decides every token: shards against the whole, samples against their distribution, ties, rows alone."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from runtime.kernels import reference, select
from runtime.noise import gumbel
from runtime.sampling import local_best
from runtime.verify import NotANumber, merge

pytestmark = pytest.mark.usefixtures("one_thread")

FALSE_ALARM = 1e-4  # of each statistical test, whose seeds are fresh
KERNELS = [pytest.param(reference, id="reference"), pytest.param(select(torch.device("cpu")), id="cpu")]
SHARDS = [[1.0], [0.5, 0.5], [0.1, 0.6, 0.3]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens_of(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, shards: list[float]) -> np.ndarray:
    """Every row's token, by way of ranks that hold these shares of the vocabulary."""
    cuts = [round(logits.shape[1] * share) for share in np.cumsum([0.0, *shards])]
    parts = [
        local_best(logits[:, first:last], temperatures, seeds, positions, first)
        for first, last in pairwise(cuts)
    ]
    scores = np.stack([score.numpy() for score, _ in parts])
    return merge(scores, np.stack([ids.to(torch.int32).numpy() for _, ids in parts]))


def scores_in_float64(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Every token's score with noise for all of them: no pruning, no shards."""
    noise = gumbel(seeds[:, None], positions[:, None], torch.arange(logits.shape[1])[None]).double()
    sampled = (temperatures > 0)[:, None]
    divisors = torch.where(sampled, temperatures[:, None], 1).double()
    return logits.double() / divisors + torch.where(sampled, noise, 0)


def rows(seed: int, count: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random logits from flat to steep, a quarter of the rows greedy."""
    generator = torch.Generator().manual_seed(seed)
    steepness = torch.exp(torch.rand(count, 1, generator=generator) * 5 - 2)
    logits = (torch.randn(count, vocab, generator=generator) * steepness).to(dtype)
    temperatures = torch.rand(count, generator=generator) * 1.9 + 0.1
    temperatures[torch.rand(count, generator=generator) < 0.25] = 0
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    return logits, temperatures, seeds, torch.randint(0, 5000, (count,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", SHARDS)
def test_shards_decide_as_one_over_the_whole_vocabulary(shards: list[float], dtype: torch.dtype, seed: int) -> None:
    batch = rows(seed, 200, 500, dtype)
    exact = scores_in_float64(*batch)
    tokens = torch.from_numpy(tokens_of(*batch, shards)).long()
    best, expected = exact.max(dim=1)  # the smallest id on ties
    wrong = tokens != expected
    near = best - exact.gather(1, tokens[:, None])[:, 0] <= 1e-5 * best.abs().clamp(min=1)
    assert bool((near | ~wrong).all()), "a token won that was clearly worse than another"
    # Scores some 1e-5 apart among 200 rows of which each has few contenders: more than two such rows would be strange.
    assert int(wrong.sum()) <= 2
    assert not bool(wrong[batch[1] == 0].any()), "greedy has no rounding to excuse it"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_give_the_best_of_all_tokens(kernels: ModuleType, dtype: torch.dtype, seed: int) -> None:
    """Logits so far apart that most tokens are pruned; every token gets its noise here."""
    logits, temperatures, seeds, positions = rows(seed, 300, 1003, dtype)
    logits = (logits * 6).to(dtype)
    scores, ids = kernels.best_tokens(logits, temperatures, seeds, positions, 77)
    noise = gumbel(seeds[:, None], positions[:, None], 77 + torch.arange(1003)[None])
    greedy = temperatures[:, None] == 0
    every = torch.where(greedy, logits.float(), logits.float() / temperatures[:, None] + noise)
    best = every.max(dim=1).values
    assert torch.allclose(scores, best, rtol=1e-6, atol=1e-5)
    reached = every.gather(1, ids[:, None] - 77)[:, 0]
    assert torch.allclose(reached, best, rtol=1e-6, atol=1e-5)
    clear = (every > best[:, None] - 1e-4).sum(dim=1) == 1
    assert clear.float().mean() > 0.5 and (every.argmax(dim=1) + 77 == ids)[clear].all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_token_far_behind_wins_by_the_noise_it_needs_and_not_by_less(kernels: ModuleType, seed: int) -> None:
    """The largest of a million noises of token 1, and logits that make it just win, and just lose, against token 0."""
    positions = torch.arange(2**20)
    seeds = torch.tensor([seed])
    at = gumbel(seeds, positions, torch.tensor([1])).argmax()
    noise = gumbel(seeds, positions[at], torch.arange(2))
    assert noise[1] > 9
    for margin, winner in ((0.001, 1), (-0.001, 0)):
        logits = torch.tensor([[float(noise[1] - noise[0]) - margin, 0.0]])
        _, ids = kernels.best_tokens(logits, torch.ones(1), seeds, positions[at][None], 0)
        assert ids.tolist() == [winner]


@pytest.mark.parametrize("temperature", [0.5, 1.5])
@pytest.mark.parametrize("shards", SHARDS[1:])
@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_samples_follow_the_softmax(varied: str, shards: list[float], temperature: float, seed: int) -> None:
    """Chi-squared over many seeds at one position, and over many positions of one seed."""
    count = 8_000
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, generator=generator)
    many, one = torch.arange(count) + seed, torch.full((count,), seed)
    seeds, positions = (many, one % 1000) if varied == "seeds" else (one, torch.arange(count))
    tokens = tokens_of(logits.expand(count, -1), torch.full((count,), temperature), seeds, positions, shards)
    expected = torch.softmax(logits.double() / temperature, 0).numpy() * count
    seen = np.bincount(tokens, minlength=40)
    rare = expected < 5  # too few for the test's approximation: they are counted together
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    assert stats.chisquare(seen[kept], expected[kept]).pvalue > FALSE_ALARM


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("winners", [[5, 9, 40], [0, 99], [49, 50], [98, 99], list(range(100))])
def test_greedy_ties_go_to_the_smallest_id(winners: list[int], shards: list[float]) -> None:
    logits = torch.zeros(3, 100, dtype=torch.bfloat16)
    logits[:, winners] = 2.5
    tokens = tokens_of(logits, torch.zeros(3), torch.arange(3), torch.arange(3), shards)
    assert tokens.tolist() == [winners[0]] * 3


def test_a_row_depends_on_no_other(seed: int) -> None:
    logits, temperatures, seeds, positions = rows(seed, 97, 333, torch.float32)
    scores, ids = local_best(logits, temperatures, seeds, positions, 1000)
    for row in range(97):
        one = slice(row, row + 1)
        score, token = local_best(logits[one], temperatures[one], seeds[one], positions[one], 1000)
        assert torch.equal(score, scores[one]) and torch.equal(token, ids[one])
    order = torch.randperm(97, generator=torch.Generator().manual_seed(seed))
    shuffled = local_best(logits[order], temperatures[order], seeds[order], positions[order], 1000)
    assert torch.equal(shuffled[0], scores[order]) and torch.equal(shuffled[1], ids[order])


@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 1e-31, 1e-6])
def test_almost_no_temperature_is_greedy(temperature: float) -> None:
    """Logits over such a temperature may overflow, and a tie of infinities would go to the smallest id."""
    logits = torch.tensor([[-3.0, 1.0, 2.0, 30.0, 4.0]])
    tokens = tokens_of(logits, torch.tensor([temperature]), torch.tensor([7]), torch.tensor([9]), [1.0])
    assert tokens.tolist() == [3]


def test_tokens_ruled_out_never_win() -> None:
    logits = torch.full((200, 50), -torch.inf)
    logits[:, [7, 33]] = 0.0
    batch = logits, torch.full((200,), 2.0), torch.arange(200), torch.arange(200)
    for shards in SHARDS:
        assert set(tokens_of(*batch, shards).tolist()) == {7, 33}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shards", SHARDS)
def test_not_a_number_is_an_error_by_name(shards: list[float], temperature: float) -> None:
    logits = torch.zeros(2, 20)
    logits[1, 13] = torch.nan
    with pytest.raises(NotANumber):
        tokens_of(logits, torch.full((2,), temperature), torch.arange(2), torch.arange(2), shards)


def test_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    scores, ids = local_best(torch.zeros(0, 10), torch.zeros(0), none, none, 0)
    assert scores.shape == ids.shape == (0,)
