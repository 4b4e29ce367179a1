"""The first promise: one (model, prompt, parameters, seed), the same tokens, whatever else is different."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.structure import of_choice, of_regex, of_schema
from runtime.request import Completion, Request, SamplingParams
from tests.driver import demo_config, run

NUM_REQUESTS, NUM_LONG = 16, 4
GRAMMARS = [
    of_schema({"type": "object"}), of_regex("[a-z]*( [a-z]+){2,9}"), of_regex("(    [a-z ]+\\n)*"), of_choice(["def", "de"])
]  # fmt: skip


@pytest.fixture(scope="module")
def seed() -> int:
    """One seed for all tests here, so that they share what plain decoding gives."""
    value = int(os.environ.get("QUASAR_SEED") or secrets.randbits(31))
    print(f"QUASAR_SEED={value}")
    return value


def wishes(rng: random.Random, tokens: list[int]) -> dict[str, Any]:
    """Random values for some of what a request may ask for besides."""

    def word() -> tuple[int, ...]:
        start = rng.randrange(len(tokens) - 3)
        return tuple(tokens[start : start + rng.randint(1, 3)])

    ways: dict[str, Callable[[], Any]] = {
        "top_p": lambda: rng.choice([0.3, 0.9, 0.999]),
        "top_k": lambda: rng.choice([1, 5, 50, 200]),
        "min_p": lambda: rng.choice([0.01, 0.2]),
        "presence_penalty": lambda: rng.uniform(-1, 2),
        "frequency_penalty": lambda: rng.uniform(-0.5, 1),
        "repetition_penalty": lambda: rng.choice([0.9, 1.2]),
        "min_tokens": lambda: rng.choice([1, 10, 40]),
        "logit_bias": lambda: tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(4000), 20)),
        "allowed_token_ids": lambda: tuple(rng.sample(sorted(set(tokens)), 100)),
        "bad_words": lambda: tuple(word() for _ in range(200)),
        "grammar": lambda: rng.choice(GRAMMARS),
        "logprobs": lambda: rng.choice([0, 3, 20]),
        "prompt_logprobs": lambda: rng.choice([0, 3, 20]),
    }
    return {name: way() for name, way in ways.items() if rng.random() < 0.25}


@cache
def requests(seed: int) -> tuple[Request, ...]:
    """Prompts of random lengths cut out of this file and its neighbours, greedy and sampled, of random lengths."""
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained("configs/demo/target")
    with open("runtime/coordinator.py") as file:
        tokens = tokenizer(file.read()).input_ids
    made = []
    for index in range(NUM_REQUESTS - NUM_LONG):
        start, length = rng.randrange(len(tokens) - 200), rng.choice([1, 2, 15, 16, 17, 60, 140])
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8, 1.3]),
            seed=rng.randrange(2**63),
            max_tokens=rng.choice([1, 2, 24, 48, 80]),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=tuple(rng.sample(range(300), 2)) if rng.random() < 0.5 else (),
            stop=(f" {rng.randrange(300)} ",) if rng.random() < 0.3 else (),
            **wishes(rng, tokens),
        )
        made.append(Request(index, tuple(tokens[start : start + length]), params))
    for index in range(NUM_REQUESTS - NUM_LONG, NUM_REQUESTS):  # what fills a small cache for certain
        params = SamplingParams(
            temperature=0.6, seed=index, max_tokens=100, ignore_eos=True, top_p=0.95, logprobs=2, prompt_logprobs=1
        )
        made.append(Request(index, tuple(tokens[index : index + 20]), params))
    return tuple(reversed(made))  # together from the start, these ask for more blocks than a small cache has


@cache
def plain(seed: int, quantization: str, dtype: str, size: int) -> dict[int, tuple[Any, ...]]:
    """Every request decoded alone, one token at a time."""
    config = demo_config(
        f"model.quantization={quantization}", f"model.dtype={dtype}", "speculation.method=none", "engine.max_num_seqs=1",
        "engine.max_num_batched_tokens=2048",
    )  # fmt: skip
    job = run(config, requests(seed), size)
    return {index: outcome(completion) for index, completion in job.completions.items()}


def outcome(completion: Completion) -> tuple[Any, ...]:
    return completion.tokens, completion.text, completion.finish_reason, completion.logprobs, completion.prompt_logprobs


SETTINGS = {
    "ngram": ["speculation.method=ngram", "speculation.num_speculative_tokens=3"],
    "suffix": ["speculation.method=suffix", "speculation.num_speculative_tokens=7"],
    "model": ["speculation.method=model", "speculation.num_speculative_tokens=4"],
    "k=1": ["speculation.num_speculative_tokens=1"],
    "k=0": ["speculation.num_speculative_tokens=0"],
    "auto": ["speculation.method=auto", "speculation.num_speculative_tokens=auto"],
    "auto, coordinator merges": ["speculation.num_speculative_tokens=auto", "coordination.merge=coordinator"],
    "one at a time": ["engine.max_num_seqs=1"],
    "coordinator merges": ["coordination.merge=coordinator", "speculation.method=model"],
    "lease of 1": ["coordination.lease=1"],
    "lease of 8": ["coordination.lease=8", "speculation.method=suffix"],
    "small chunks": ["engine.max_num_batched_tokens=29"],
    "blocks of 8, small cache": ["engine.block_size=8", "engine.kv_cache_memory={small}", "speculation.method=model"],
    "small cache, coordinator merges": ["engine.kv_cache_memory={small}", "coordination.merge=coordinator"],
    "two threads": ["engine.threads=2"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_tokens(name: str, seed: int) -> None:
    check(name, seed, "int4", "auto")


@pytest.mark.parametrize("name", ["model", "small cache, coordinator merges", "small chunks"])
@pytest.mark.parametrize(("quantization", "dtype"), [("none", "auto"), ("none", "float32"), ("int4", "float32")])
def test_same_tokens_in_other_arithmetic(name: str, quantization: str, dtype: str, seed: int) -> None:
    check(name, seed, quantization, dtype)


@pytest.mark.parametrize("name", ["model", "small cache, coordinator merges", "suffix"])
def test_same_tokens_on_two_ranks(name: str, seed: int) -> None:
    """The vocabulary and all else in two: what ranks exchange must not depend on who else is there."""
    check(name, seed, "int4", "auto", size=2)


def check(name: str, seed: int, quantization: str, dtype: str, size: int = 1) -> None:
    settings = [s.format(small=small_cache("model" in " ".join(SETTINGS[name]), dtype, size)) for s in SETTINGS[name]]
    config = demo_config(f"model.quantization={quantization}", f"model.dtype={dtype}", *settings)
    job = run(config, requests(seed), size)
    expected = plain(seed, quantization, dtype, size)
    assert {index: outcome(completion) for index, completion in job.completions.items()} == expected
    assert all(group.pool.num_free == group.pool.size for group in job.machine._ready.values())
    if "auto" in name:
        assert len(set(job.machine.stats.drafted)) > 1, "numbers of drafts did not vary"
    if "small cache" in name:
        assert job.admissions > NUM_REQUESTS, "the cache was large enough after all"


def small_cache(with_draft: bool, dtype: str, size: int) -> int:
    """Bytes for 240 tokens, whole blocks of any size: one of these sequences fits, two large ones do not."""
    width = 4 if dtype == "float32" else 2
    target, draft = 2 * 4 * 4 * 64 * width // size, 2 * 2 * 2 * 32 * width  # keys and values, layers, KV heads, head_dim
    return 240 * (target + (draft if with_draft else 0))
