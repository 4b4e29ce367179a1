"""What comes out is distributed as the parameters say, whatever drafts: chi-squared against enumerated probabilities.

Every case draws pairs of consecutive tokens: each pair is one sequence with its own seed and one draft, which the rule
checks; where it doesn't stand, a second check decides the second token, as in a real round. A table stands for the model:
logits for the next token by the one before. A case fails if two draws in a row look wrong, the second of four times as many
sequences. By chance alone either of two tests does in one draw in 10,000; so two runs in a million fail falsely, where a single
draw would make that one in 100.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from runtime.check import Check
from runtime.comm import Solo
from runtime.noise import gumbel
from runtime.sampling import choose
from runtime.sequence import Sampling, Sequence
from runtime.verify import decide
from tests.brute_force import probabilities, sequence_of
from tests.small_words import CHOICE

VOCAB = 12
DRAWS = 1_300  # sequences of a case, with two tokens each; 48 cases make more than 10^5 draws
FALSE_ALARM = 1e-4
PROMPT = [3, 5]

ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "all filters": {"top_k": 6, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "penalties and filters": {"presence_penalty": -0.7, "repetition_penalty": 1.4, "top_k": 5, "top_p": 0.95},
    "bias and allowed": {"logit_bias": {1: 2.0, 4: -1.0}, "allowed_token_ids": [0, 1, 3, 4, 8, 9, 11], "top_p": 0.9},
    "bad words": {"bad_words": [[7], [1, 2], [0, 0], [5, 3]], "min_p": 0.01},
    "min_tokens": {"min_tokens": 1, "top_k": 7},
    "grammar": {"grammar": CHOICE},
    "grammar and the rest": {"grammar": CHOICE, "top_p": 0.9, "logit_bias": {3: 1.0}, "frequency_penalty": 0.5},
}

Draft = Callable[[Tensor, Sequence, random.Random], int]


def good(logits: Tensor, sequence: Sequence, rng: random.Random) -> int:
    """The target's rule with the target's logits, a little wrong, and the target's noise: what a model drafter does."""
    noise = gumbel(torch.tensor([sequence.sampling.seed]), torch.tensor([sequence.num_committed]), torch.arange(VOCAB))
    wrong = torch.roll(torch.linspace(-0.5, 0.5, VOCAB), rng.randrange(VOCAB))
    return int((logits / sequence.sampling.temperature + wrong + noise).argmax())


def bad(logits: Tensor, sequence: Sequence, rng: random.Random) -> int:
    """Knows nothing and draws anything."""
    return rng.randrange(VOCAB)


def reuses_noise(logits: Tensor, sequence: Sequence, rng: random.Random) -> int:
    """Drafts by the noise alone - of the next position, too: whoever let a draft's fate change the draw would show it."""
    positions = torch.tensor([[sequence.num_committed], [sequence.num_committed + 1]])
    noise = gumbel(torch.tensor([sequence.sampling.seed]), positions, torch.arange(VOCAB)[None])
    return int((noise[0] - noise[1]).argmax())


def least_likely(logits: Tensor, sequence: Sequence, rng: random.Random) -> int:
    return int(logits.argmin())


DRAFTERS: list[Draft] = [good, bad, reuses_noise, least_likely]


def pairs(table: Tensor, asked: dict[str, Any], draft: Draft, count: int, rng: random.Random) -> np.ndarray:
    """Two consecutive tokens of each of `count` sequences, [count, 2]."""
    start = rng.randrange(2**62)
    sequences = [sequence_of(PROMPT, [], Sampling(0.8, start + i, **asked), ends=(11,), slot=i) for i in range(count)]
    first = [Check(s, len(PROMPT), 2, [draft(table[PROMPT[-1]], s, rng)]) for s in sequences]
    outputs = run_round(table, first)
    again = []
    for sequence, output in zip(sequences, outputs, strict=True):
        sequence.tokens += output
        if len(output) < 2:
            again.append(Check(sequence, len(PROMPT) + 1, 1, []))
    for check, output in zip(again, run_round(table, again), strict=True):
        check.sequence.tokens += output
    return np.array([sequence.tokens[len(PROMPT) :] for sequence in sequences])


def run_round(table: Tensor, checks: list[Check]) -> list[list[int]]:
    """What a round commits for each check."""
    inputs = [token for check in checks for token in [check.sequence.tokens[-1], *check.drafts]]
    choice = choose(table[inputs], checks, Solo(), 0)
    counts = np.array([len(check.drafts) for check in checks], np.int32)
    drafts = np.array([token for check in checks for token in check.drafts], np.int32)
    slots = np.arange(len(checks), dtype=np.int32)
    decision = decide(slots, np.ones(len(checks), bool), counts, drafts, choice.ids)
    return [part.tolist() for part in np.split(decision.tokens, np.cumsum(decision.num_tokens)[:-1])]


def p_value(seen: np.ndarray, expected: np.ndarray) -> float:
    """Chi-squared; cells too rare for its approximation are counted together. What cannot be must not be seen at all."""
    assert not seen[expected == 0].any(), "a token was drawn that is ruled out"
    rare = (expected < 5) & (expected > 0)
    seen = np.append(seen[expected >= 5], seen[rare].sum())
    expected = np.append(expected[expected >= 5], expected[rare].sum())
    kept = expected > 0
    return float(stats.chisquare(seen[kept], expected[kept] * (seen.sum() / expected.sum())).pvalue) if kept.sum() > 1 else 1.0


@pytest.mark.parametrize("draft", DRAFTERS, ids=lambda draft: draft.__name__)
@pytest.mark.parametrize("name", ASKED)
def test_pairs_of_tokens_follow_their_joint_distribution(name: str, draft: Draft, seed: int) -> None:
    rng = random.Random(f"{seed} {name} {draft.__name__}")
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * 1.5
    one = sequence_of(PROMPT, [], Sampling(0.8, 0, **ASKED[name]), ends=(11,))
    joint = np.zeros((VOCAB, VOCAB))
    for token, p in enumerate(probabilities(table[PROMPT[-1]].tolist(), one, [])):
        if p > 0:
            joint[token] = p * np.array(probabilities(table[token].tolist(), one, [token]))
    for draws in (DRAWS, 4 * DRAWS):
        found = pairs(table, ASKED[name], draft, draws, rng)
        seen = np.zeros((VOCAB, VOCAB))
        np.add.at(seen, (found[:, 0], found[:, 1]), 1)
        chances = p_value(seen.ravel(), joint.ravel() * draws), p_value(seen.sum(0), joint.sum(0) * draws)
        print(f"{draws} sequences: {chances}")
        if min(chances) > FALSE_ALARM:
            return
    pytest.fail(f"two draws in a row look wrong: {chances}")


def test_the_drafters_are_what_they_are_called(seed: int) -> None:
    """Shares of the drafts that stand: high, low and none; and no drafter changes a token."""
    rng = random.Random(seed)
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5
    stand = {}
    for draft in DRAFTERS:
        sequences = [sequence_of(PROMPT, [], Sampling(0.8, i)) for i in range(400)]
        checks = [Check(s, len(PROMPT), 2, [draft(table[PROMPT[-1]], s, rng)]) for s in sequences]
        stand[draft.__name__] = sum(len(output) == 2 for output in run_round(table, checks)) / 400
    assert stand["good"] > 0.5 > stand["bad"] + 0.2 and stand["least_likely"] < 0.1
    results = [pairs(table, ASKED["penalties and filters"], draft, 300, random.Random(seed)) for draft in (bad, least_likely)]
    assert (results[0] == results[1]).all()


def test_a_wrong_distribution_is_noticed(seed: int) -> None:
    """The test's own test: a temperature 15 % off."""
    rng = random.Random(seed)
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5
    one = sequence_of(PROMPT, [], Sampling(0.92, 0))
    joint = np.zeros((VOCAB, VOCAB))
    for token, p in enumerate(probabilities(table[PROMPT[-1]].tolist(), one, [])):
        joint[token] = p * np.array(probabilities(table[token].tolist(), one, [token]))
    found = pairs(table, {}, bad, 20_000, rng)
    seen = np.zeros((VOCAB, VOCAB))
    np.add.at(seen, (found[:, 0], found[:, 1]), 1)
    assert p_value(seen.ravel(), joint.ravel() * 20_000) < FALSE_ALARM
