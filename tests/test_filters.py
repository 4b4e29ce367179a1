"""Top-k, top-p and min-p: the same tokens as loops in float64 leave, on any number of ranks, however wide the nucleus."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import filters
from runtime.comm import Communicator
from runtime.filters import Limits, cut_offs
from runtime.kernels.reference_sampling import cut
from runtime.order import NONE, best_keys, ids_of, keys_of, lowest_keys, values_in, values_of
from runtime.sequence import Sampling
from runtime.shard import vocabulary_spans
from tests.brute_force import kept, random_filters
from tests.tiny_models import on_ranks


def left_on(size: int, scaled: Tensor, samplings: list[Sampling]) -> Tensor:
    """Which tokens are left, bool [R, V]: each rank cuts its slice, and they all cut alike."""
    spans = vocabulary_spans(scaled.shape[1], size)
    ones = torch.ones(len(scaled))

    def left(comm: Communicator) -> tuple[Tensor, Tensor]:
        own, first = scaled[:, slice(*spans[comm.rank])], spans[comm.rank].start
        cuts = cut_offs(own, ones, Limits.of(samplings, scaled.device), comm, first)
        return cuts, cut(own, ones, cuts, first) > -torch.inf

    found = on_ranks(size, left)
    assert all(torch.equal(cuts, found[0][0]) for cuts, _ in found)
    return torch.cat([kept for _, kept in found], dim=1)


def some_rows(rng: random.Random, count: int, vocab: int) -> tuple[Tensor, list[Sampling]]:
    """From steep to flat, some rounded so that ties are everywhere, some with much that is forbidden."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    scaled = torch.randn(count, vocab, generator=generator) * torch.exp(torch.rand(count, 1, generator=generator) * 6 - 3)
    for row in scaled:
        if rng.random() < 0.4:
            row.copy_(torch.round(row * 2) / 2)
        if rng.random() < 0.3:
            row[torch.rand(vocab, generator=generator) < 0.9] = -torch.inf
            row[rng.randrange(vocab)] = 0.0
    return scaled, [Sampling(1.0, **random_filters(rng)) for _ in range(count)]


@pytest.mark.parametrize(("vocab", "count"), [(64, 150), (700, 60), (5000, 20)])
def test_filters_leave_what_they_should_on_any_number_of_ranks(vocab: int, count: int, seed: int) -> None:
    rng = random.Random(f"{seed} {vocab}")
    scaled, samplings = some_rows(rng, count, vocab)
    whole, two, four = (left_on(size, scaled, samplings) for size in (1, 2, 4))
    for row, sampling in enumerate(samplings):
        expected, margin = kept(scaled[row].double().tolist(), sampling)
        if margin < 1e-9:  # rounding decides, in the reference too
            continue
        allowed = scaled[row] > -torch.inf
        for found in (whole, two, four):
            assert set((found[row] & allowed).nonzero().flatten().tolist()) == expected, sampling
    for row in rng.sample(range(count), 10):
        alone = left_on(2, scaled[row : row + 1], samplings[row : row + 1])
        assert torch.equal(alone[0], two[row]), "a row depends on no other"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_nucleus_wider_than_the_lists_is_never_cut(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 tokens nearly alike: 0.95 of the mass is some 9,500 of them, of which lists hold 64 and then 1024 a rank."""
    widths: list[tuple[int, int]] = []
    look = filters.look

    def watched(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        widths.append((rest[-1], len(logits)))
        return look(logits, *rest)

    monkeypatch.setattr(filters, "look", watched)
    scaled = torch.linspace(0.01, 0.0, 10_000)[torch.randperm(10_000)][None].repeat(2, 1)
    scaled[1] *= 200_000  # the second row's nucleus is short, and is not exchanged again
    found = left_on(size, scaled, [Sampling(1.0, top_p=0.95)] * 2)
    for row in range(2):
        expected, margin = kept_fast(scaled[row], 0.95)
        assert margin < 1e-3 and abs(int(found[row].sum()) - expected) <= 1
    assert set(widths) == {(64, 2), (64 * 16, 1), (64 * 16**2, 1)}
    assert found[0].sum() > 9000 and found[1].sum() < 64


def kept_fast(scaled: Tensor, top_p: float) -> tuple[int, float]:
    masses = torch.softmax(scaled.double(), 0).sort(descending=True).values
    before = masses.cumsum(0) - masses
    return int((before < top_p).sum()), float((before - top_p).abs().min())


def test_ties_go_to_the_smaller_id() -> None:
    scaled = torch.zeros(3, 64)
    samplings = [Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.5), Sampling(1.0, min_p=0.9)]
    for size in (1, 2, 4):
        assert [row.nonzero().flatten().tolist() for row in left_on(size, scaled, samplings)] == [
            list(range(5)), list(range(32)), list(range(64)),
        ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_rows_without_a_finite_best_pass_whole(size: int) -> None:
    scaled = torch.full((4, 64), -torch.inf)
    scaled[1, 40] = torch.inf
    scaled[2, 40] = torch.nan
    scaled[3, 40] = 0.0
    samplings = [Sampling(1.0, top_p=0.5, top_k=3, min_p=0.1)] * 4
    assert left_on(size, scaled, samplings)[3].nonzero().flatten().tolist() == [40]


def test_keys_sort_as_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(500, generator=generator).mul(3).round() * torch.tensor([1e-42, 1.0, 1e30]).repeat(167)[:500]
    values[:4] = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf])
    ids = torch.randint(0, 2**31 - 1, (500,), generator=generator)
    keys = keys_of(values, ids)
    expected = sorted(range(500), key=lambda i: (-float(values[i]), int(ids[i])))
    assert torch.argsort(keys, descending=True).tolist() == expected
    assert ids_of(keys.numpy()).tolist() == ids.tolist() and values_of(keys.numpy()).tolist() == values.tolist()
    assert int(keys.min()) > NONE
    assert torch.equal(values_in(keys), torch.from_numpy(values_of(keys.numpy()))) and values_in(torch.tensor([NONE])).isnan()
    assert best_keys(keys[None], 600)[0].tolist() == [*keys.sort(descending=True).values.tolist(), *[NONE] * 100]
    for bound in (0.1, 0.5, -3.0, float("-inf")):
        least = lowest_keys(torch.tensor(bound, dtype=torch.float64))
        assert [int(key) >= int(least) for key in keys] == [float(value) >= bound for value in values]
