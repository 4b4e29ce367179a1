"""Several continuations of one prompt are what as many requests with their seeds would be, and share its cache."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
from transformers import AutoTokenizer

from launcher.encoder import copies
from runtime.request import Completion, Request, SamplingParams
from tests.driver import demo_config, run
from tests.seeds import fresh_seed

COUNTS = (1, 3, 5, 2)


@pytest.fixture(scope="module")
def seed() -> int:
    """One seed for all tests here, so that they share what separate requests give."""
    return fresh_seed()


@cache
def requests(seed: int) -> tuple[Request, ...]:
    """Prompts of less than a block and of several, each with a few continuations; some end after one token."""
    rng = random.Random(seed)
    with open("runtime/group.py") as file:
        tokens = AutoTokenizer.from_pretrained("configs/demo/target")(file.read()).input_ids
    made: list[Request] = []
    for index, count in enumerate(COUNTS):
        start, length = rng.randrange(len(tokens) - 200), rng.choice([15, 16, 17, 33, 70])
        params = SamplingParams(
            temperature=rng.choice([0.7, 1.2]), seed=rng.randrange(2**63), max_tokens=rng.choice([1, 6, 40]), ignore_eos=True
        )
        made += copies(Request(index, tuple(tokens[start : start + length]), params), count)
    return tuple(made)


@cache
def separately(seed: int) -> dict[tuple[int, int], tuple[tuple[int, ...], str, str]]:
    """Every continuation as a request of its own, alone."""
    config = demo_config("speculation.method=none", "engine.max_num_seqs=1")
    return {
        (request.index, request.copy): outcome(run(config, [replace(request, copy=0)]).completions[request.index])
        for request in requests(seed)
    }


def outcome(completion: Completion) -> tuple[tuple[int, ...], str, str]:
    return completion.tokens, completion.text, completion.finish_reason


SETTINGS = {
    "blocks of 8": ["engine.block_size=8"],
    "blocks of 16, one at a time": ["engine.max_num_seqs=1"],
    "a draft model": ["engine.block_size=8", "speculation.method=model"],
    "coordinator merges": ["engine.block_size=8", "coordination.merge=coordinator", "engine.max_num_batched_tokens=29"],
    "small cache": ["engine.block_size=8", "engine.kv_cache_memory=524288", "speculation.method=suffix"],  # 128 tokens
    "long leases": ["engine.block_size=8", "coordination.lease=8", "engine.max_num_seqs=3"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_copies_are_requests_with_seeds_of_their_own(name: str, seed: int) -> None:
    job = run(demo_config(*SETTINGS[name]), requests(seed))
    assert {who: outcome(completion) for who, completion in job.copies.items()} == separately(seed)
    assert all(group.pool.num_free == group.pool.size and not group.kept for group in job.machine._ready.values())
    if "8" in SETTINGS[name][0]:
        assert job.borrowed > 0, "no copy was spared its prompt"


def test_the_prompt_is_computed_once(seed: int) -> None:
    """Of two hundred tokens in blocks of 8, every other copy computes the last eight."""
    prompt = tuple(random.Random(seed).randrange(5, 300) for _ in range(200))
    request = Request(0, prompt, SamplingParams(seed=seed, max_tokens=1, ignore_eos=True))
    job = run(demo_config("engine.block_size=8", "engine.max_num_seqs=2"), copies(request, 6))
    assert (job.admissions, job.borrowed) == (6, 5) and len(job.copies) == 6
