"""Log-probabilities against log_softmax in float64, on any number of ranks; and the sums of exponentials below them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from runtime.check import Check
from runtime.logprobs import Logprobs
from runtime.sampling import choose
from runtime.sequence import Sampling
from runtime.shard import vocabulary_spans
from runtime.softmax import exp, merge_sums, sums
from runtime.verify import NotANumber, merge
from tests.brute_force import random_edits, random_filters, sequence_of
from tests.tiny_models import on_ranks

VOCAB = 300


def choose_on(size: int, logits: Tensor, checks: list[Check]) -> tuple[list[int], Logprobs | None]:
    """Every row's token, and what every rank says about log-probabilities."""
    spans = vocabulary_spans(logits.shape[1], size)
    choices = on_ranks(size, lambda comm: choose(logits[:, slice(*spans[comm.rank])], checks, comm, spans[comm.rank].start))
    found = [choice.logprobs for choice in choices]
    if found[0] is not None:
        assert all(one is not None and one.by_slot() == found[0].by_slot() for one in found)
    scores, ids = (torch.tensor([getattr(c, name).tolist() for c in choices]) for name in ("scores", "ids"))
    return merge(scores.float().numpy(), ids.int().numpy()).tolist(), found[0]


def some_checks(rng: random.Random, count: int) -> list[Check]:
    """Sequences in the middle of their prompts, at the ends of them, and beyond; with and without all there is to ask for."""
    checks = []
    for slot in range(count):
        wants = {"logprobs": rng.choice([None, 0, 4, 20]), "prompt_logprobs": rng.choice([None, 0, 7])}
        more = {**random_edits(rng, VOCAB), **random_filters(rng)} if rng.random() < 0.5 else {}
        sampling = Sampling(rng.choice([0.0, 0.9]), rng.randrange(2**60), **wants, **more)
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 12))]
        output = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 3]))]
        sequence = sequence_of(prompt, output, sampling, slot=slot)
        if sampling.prompt_logprobs is not None and not output:
            start = rng.randrange(1, len(prompt) + 1)
            count_ = rng.randint(1, len(prompt) - start + 2)
            checks.append(Check(sequence, start, count_, [9] * max(0, start + count_ - 1 - len(prompt))))
        else:
            drafts = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))]
            checks.append(Check(sequence, sequence.num_committed, len(drafts) + 1, drafts))
    return checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(f"{seed} {dtype}")
    checks = some_checks(rng, 60)
    rows = sum(check.count for check in checks)
    logits = (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)
    exact = torch.log_softmax(logits.double(), dim=1)
    results = [choose_on(size, logits, checks) for size in (1, 2, 4)]
    assert results[0][0] == results[1][0] == results[2][0]
    for tokens, logprobs in results:
        assert logprobs is not None
        by_slot = logprobs.by_slot()
        decided = iter(tokens)
        row = seen = 0
        for check in checks:
            sequence, sampling = check.sequence, check.sequence.sampling
            for position in range(check.position, check.position + check.count):
                known = position < sequence.num_committed
                token = sequence.tokens[position] if known else next(decided)
                top = sampling.prompt_logprobs if known else sampling.logprobs
                if top is not None:
                    found = by_slot[sequence.slot][position]
                    assert found.token == token
                    assert found.logprob == pytest.approx(float(exact[row, token]), rel=2e-7)
                    order = sorted(range(VOCAB), key=lambda t: (-float(logits[row, t]), t))[:top]
                    assert [t for t, _ in found.top] == order
                    assert [v for _, v in found.top] == pytest.approx(exact[row, order].tolist(), rel=2e-7)
                    seen += 1
                row += 1
        assert row == rows and seen == sum(map(len, by_slot.values()))


def test_a_row_depends_on_no_other(seed: int) -> None:
    rng = random.Random(seed)
    checks = some_checks(rng, 30)
    logits = torch.randn(sum(check.count for check in checks), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    tokens, logprobs = choose_on(2, logits, checks)
    assert logprobs is not None
    row = decided = 0
    for check in checks:
        alone, scored = choose_on(2, logits[row : row + check.count], [check])
        slot = check.sequence.slot
        assert alone == tokens[decided : decided + len(alone)]
        assert (scored.by_slot().get(slot) if scored else None) == logprobs.by_slot().get(slot), "bit for bit"
        row, decided = row + check.count, decided + len(alone)


def test_who_asks_for_nothing_exchanges_nothing() -> None:
    """A barrier of two that only one rank would come to shows any exchange."""
    checks = [Check(sequence_of([1, 2], [3], Sampling(0.8, 5)), 3, 2, [4])]

    def work(comm):
        choice = choose(torch.randn(2, 16), checks, comm, 0)
        return choice.logprobs, comm.calls

    assert on_ranks(2, work) == [(None, 0)] * 2


@pytest.mark.parametrize("size", [1, 2])
def test_not_a_number_is_an_error_by_name(size: int) -> None:
    logits = torch.zeros(1, 64)
    logits[0, 50] = torch.nan
    for sampling in (Sampling(0.5, logprobs=2), Sampling(0.5, top_p=0.5), Sampling(0.0, logit_bias={1: 1.0})):
        with pytest.raises(NotANumber):
            choose_on(size, logits, [Check(sequence_of([1], [], sampling), 1, 1, [])])


def test_exponentials(seed: int) -> None:
    x = -torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 4 * 700
    exact = torch.tensor([math.exp(value) for value in x.tolist()], dtype=torch.float64)
    assert ((exp(x) - exact).abs() <= 3 * 2.0**-52 * exact).all()
    for start, length in ((0, 1), (1, 7), (19_990, 10), (3, 4097)):
        assert torch.equal(exp(x[start : start + length]), exp(x)[start : start + length]), "wherever it lies"
    edges = exp(torch.tensor([0.0, -1e-320, -torch.inf, -701.0], dtype=torch.float64))
    assert edges.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_merge(size: int, seed: int) -> None:
    x = torch.randn(50, 6, 40, generator=torch.Generator().manual_seed(seed)) * 30
    x[:, 0] = -torch.inf  # a slice that is all padding
    slices = x[:, :size]
    if size == 1:
        slices = x[:, 1:2]
    tops = slices.amax(-1).double().T
    totals = torch.stack([sums(part, top).nan_to_num(0.0) for part, top in zip(slices.unbind(1), tops, strict=True)])
    top, total = merge_sums(tops, totals)
    torch.testing.assert_close(top + total.log(), slices.double().flatten(1).logsumexp(1), rtol=1e-14, atol=0)
