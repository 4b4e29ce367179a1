"""Forbidden tokens, biases and penalties, against loops in float64; drafts before a position count, and nothing after it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from runtime.check import Check
from runtime.edits import edit
from runtime.sequence import Sampling
from tests.brute_force import edited, random_edits, sequence_of
from tests.small_words import CHOICE

VOCAB = 40
NAMES = [*random_edits(random.Random(0), VOCAB), "grammar"]


def some_checks(rng: random.Random, count: int, names: list[str]) -> list[Check]:
    checks = []
    for slot in range(count):
        few = random_edits(rng, VOCAB) | {"grammar": rng.choice([None, CHOICE])}
        sampling = Sampling(**{name: few[name] for name in names})
        prompt, output, drafts = (
            [rng.randrange(4 if rng.random() < 0.7 else VOCAB) for _ in range(rng.randint(low, 8))] for low in (1, 0, 0)
        )
        sequence = sequence_of(prompt, output, sampling, ends=(2, 30), slot=slot)
        checks.append(Check(sequence, sequence.num_committed, len(drafts) + 1, drafts))
    return checks


@pytest.mark.parametrize("names", [*([name] for name in NAMES), NAMES], ids=[*NAMES, "all"])
@pytest.mark.parametrize("cuts", [[0, VOCAB], [0, 16, VOCAB], [0, 8, 16, 32, VOCAB]], ids=["whole", "two", "four"])
def test_edits(names: list[str], cuts: list[int], seed: int) -> None:
    rng = random.Random(f"{seed} {names} {cuts}")
    checks = some_checks(rng, 40, names)
    rows = [(check, check.position + i) for check in checks for i in range(check.count)]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    parts = [logits[:, first:last].clone() for first, last in pairwise(cuts)]
    for part, first in zip(parts, cuts, strict=False):
        edit(part, rows, first)
    found = torch.cat(parts, dim=1)
    for row, (check, position) in enumerate(rows):
        sequence = check.sequence
        before = [*sequence.tokens, *check.drafts][:position]
        expected = torch.tensor(edited(logits[row].tolist(), sequence, before[sequence.num_prompt :]), dtype=torch.float64)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
    for row in rng.sample(range(len(rows)), 10):
        alone = logits[row : row + 1].clone()
        edit(alone, rows[row : row + 1], 0)
        assert torch.equal(alone[0], found[row]), "a row depends on no other"


def test_a_whole_draft_of_a_bad_word_is_caught_where_it_ends() -> None:
    sequence = sequence_of([5, 6], [7], Sampling(bad_words=[[7, 8, 9], [6, 7]]))
    logits = torch.zeros(4, 12)
    check = Check(sequence, 3, 4, [8, 9, 6])
    edit(logits, [(check, 3 + i) for i in range(4)], 0)
    assert [row.isneginf().nonzero().flatten().tolist() for row in logits] == [[], [9], [], [7]]


def test_nothing_asked_changes_nothing() -> None:
    logits = torch.randn(3, 12)
    before = logits.clone()
    edit(logits, [(Check(sequence_of([1], [2, 2], Sampling()), 3, 1, []), 3)] * 3, 0)
    assert torch.equal(before, logits)


def test_what_a_request_asks_shows() -> None:
    for name, value in [
        ("min_tokens", 1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1), ("repetition_penalty", 0.9),
        ("logit_bias", {1: 1.0}), ("allowed_token_ids", []), ("bad_words", [[1]]), ("grammar", "start: //"),
    ]:  # fmt: skip
        assert Sampling(**{name: value}).edits, name
    assert not Sampling(0.7, 3, top_p=0.5, logprobs=3).edits
    for name, value in [("top_k", 1), ("top_p", 0.99), ("min_p", 0.1)]:
        assert Sampling(0.7, **{name: value}).filters and not Sampling(0.0, **{name: value}).filters, name
