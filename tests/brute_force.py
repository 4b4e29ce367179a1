"""What a request's parameters mean, in loops over float64 that cannot be wrong: the reference for everything that chooses."""

from __future__ import annotations

import math
import random
from typing import Any

from runtime.sequence import Sampling, Sequence
from tests.small_words import CHOICES, LETTERS, allowed, letters


def edited(logits: list[float], sequence: Sequence, output: list[int]) -> list[float]:
    """The logits after all that is forbidden, biased and penalised. The only grammar known here is CHOICE."""
    s, prompt = sequence.sampling, sequence.tokens[: sequence.num_prompt]
    out = []
    for token, value in enumerate(logits):
        forbidden = s.allowed_token_ids is not None and token not in s.allowed_token_ids
        for word in s.bad_words:
            prefix = word[:-1]
            forbidden |= token == word[-1] and len(output) >= len(prefix) and output[len(output) - len(prefix) :] == prefix
        forbidden |= s.grammar is not None and token not in allowed(set(CHOICES), LETTERS, output)
        forbidden |= len(output) < s.min_tokens and token in sequence.premature
        value = -math.inf if forbidden else value
        value += s.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
        value -= s.frequency_penalty * output.count(token)
        value -= s.presence_penalty * (token in output)
        out.append(value)
    return out


def kept(scaled: list[float], s: Sampling) -> tuple[set[int], float]:
    """What min-p, top-k and top-p leave, and how near the nearest mass came to top-p's border, as a share of all."""
    order = sorted((t for t in range(len(scaled)) if scaled[t] > -math.inf), key=lambda t: (-scaled[t], t))
    top = scaled[order[0]]
    if s.min_p > 0:
        order = [t for t in order if scaled[t] - top >= math.log(s.min_p)]
    if s.top_k > 0:
        order = order[: s.top_k]
    margin = 1.0
    if s.top_p < 1:
        masses = [math.exp(scaled[t] - top) for t in order]
        total = math.fsum(masses)
        before = [math.fsum(masses[:i]) / total for i in range(len(order))]
        margin = min(abs(mass - s.top_p) for mass in before)
        order = [t for t, mass in zip(order, before, strict=True) if mass < s.top_p]
    return set(order), margin


def probabilities(logits: list[float], sequence: Sequence, output: list[int]) -> list[float]:
    """Every token's probability of being the next one; temperature above 0."""
    scaled = [value / sequence.sampling.temperature for value in edited(logits, sequence, output)]
    left, _ = kept(scaled, sequence.sampling)
    top = max(scaled)
    masses = [math.exp(value - top) if token in left else 0.0 for token, value in enumerate(scaled)]
    total = math.fsum(masses)
    return [mass / total for mass in masses]


def random_edits(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Values for the fields of `Sampling` that change logits."""
    return {
        "min_tokens": rng.choice([0, 3, 12]),
        "presence_penalty": rng.choice([0.0, rng.uniform(-2, 2)]),
        "frequency_penalty": rng.choice([0.0, rng.uniform(-1, 1)]),
        "repetition_penalty": rng.choice([1.0, rng.uniform(0.5, 2)]),
        "logit_bias": {rng.randrange(vocab): rng.uniform(-4, 4) for _ in range(rng.choice([0, 5]))},
        "allowed_token_ids": rng.choice([None, rng.sample(range(vocab), vocab // 2)]),
        "bad_words": [[rng.randrange(4) for _ in range(rng.randint(1, 3))] for _ in range(rng.choice([0, 3]))],
    }


def random_filters(rng: random.Random) -> dict[str, Any]:
    """Values for the fields of `Sampling` that leave only likely tokens."""
    return {
        "top_k": rng.choice([0, 1, 3, 30, 200]),
        "top_p": rng.choice([1.0, rng.uniform(0.05, 0.95), 0.999]),
        "min_p": rng.choice([0.0, 10 ** rng.uniform(-5, -0.3)]),
    }


def sequence_of(
    prompt: list[int], output: list[int], sampling: Sampling, ends: tuple[int, ...] = (), slot: int = 0
) -> Sequence:
    guide = None if sampling.grammar is None else letters().guide(sampling.grammar)
    tokens, stops = [*prompt, *output], frozenset(ends)
    return Sequence(slot, slot, tokens, len(prompt), 10_000, stops, sampling, premature=stops, guide=guide)
