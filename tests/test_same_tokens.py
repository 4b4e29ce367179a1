"""The first promise: one (model, prompt, parameters, seed), the same tokens, whatever else is different."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from launcher.structure import of_choice, of_regex, of_schema
from runtime.request import Completion, Request, SamplingParams
from tests.driver import demo_config, run
from tests.seeds import fresh_seed
from tests.tiny_models import make, save

NUM_REQUESTS, NUM_LONG = 16, 4
GRAMMARS = [
    of_schema({"type": "object"}), of_regex("[a-z]*( [a-z]+){2,9}"), of_regex("(    [a-z ]+\\n)*"), of_choice(["def", "de"])
]  # fmt: skip


@pytest.fixture(scope="module")
def seed() -> int:
    """One seed for all tests here, so that they share what plain decoding gives."""
    return fresh_seed()


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
        "allowed_token_ids": lambda: tuple(rng.sample(sorted(set(tokens)), 50)),
        "bad_words": lambda: tuple(word() for _ in range(200)),
        "grammar": lambda: rng.choice(GRAMMARS),
        "logprobs": lambda: rng.choice([0, 3, 20]),
        "prompt_logprobs": lambda: rng.choice([0, 3, 20]),
    }
    return {name: way() for name, way in ways.items() if rng.random() < 0.25}


def draw(
    rng: random.Random, count: int, tokens: list[int], lengths: Sequence[int] = (1, 2, 24, 48, 80)
) -> list[Request]:
    """Prompts of random lengths cut out of a text, greedy and sampled, for outputs of random lengths."""
    made = []
    for index in range(count):
        start, length = rng.randrange(len(tokens) - 200), rng.choice([1, 2, 15, 16, 17, 60, 140])
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8, 1.3]),
            seed=rng.randrange(2**63),
            max_tokens=rng.choice(lengths),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=tuple(rng.sample(range(300), 2)) if rng.random() < 0.5 else (),
            stop=(f" {rng.randrange(300)} ",) if rng.random() < 0.3 else (),
            **wishes(rng, tokens),
        )
        made.append(Request(index, tuple(tokens[start : start + length]), params))
    return made


@cache
def text() -> list[int]:
    """Tokens of a file of ours, in the demo's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained("configs/demo/target")
    tokens: list[int] = tokenizer(Path("runtime/coordinator.py").read_text()).input_ids
    return tokens


@cache
def requests(seed: int) -> tuple[Request, ...]:
    tokens = text()
    made = draw(random.Random(seed), NUM_REQUESTS - NUM_LONG, tokens)
    return (*long(len(made), tokens), *made)


def long(first: int, tokens: list[int]) -> list[Request]:
    """Requests that together, from the start, ask for more blocks than a small cache has."""
    params = SamplingParams(temperature=0.6, max_tokens=100, ignore_eos=True, top_p=0.95, logprobs=2, prompt_logprobs=1)
    names = range(first, first + NUM_LONG)
    return [Request(index, tuple(tokens[index : index + 20]), replace(params, seed=index)) for index in names]


@cache
def plain(seed: int, quantization: str, dtype: str) -> dict[int, tuple[Any, ...]]:
    return alone([f"model.quantization={quantization}", f"model.dtype={dtype}"], requests(seed))


def alone(model: list[str], requests: Sequence[Request]) -> dict[int, tuple[Any, ...]]:
    """Every request decoded by itself on one rank, one token at a time."""
    one = ["speculation.method=none", "engine.max_num_seqs=1", "engine.max_num_batched_tokens=2048"]
    job = run(demo_config(*model, *one), requests)
    return {index: outcome(completion) for index, completion in job.completions.items()}


def outcome(completion: Completion) -> tuple[Any, ...]:
    return completion.tokens, completion.text, completion.finish_reason, completion.logprobs, completion.prompt_logprobs


SETTINGS = {
    "ngram": ["speculation.method=ngram", "speculation.num_speculative_tokens=3"],
    "suffix": ["speculation.method=suffix", "speculation.num_speculative_tokens=7"],
    "model": ["speculation.method=model", "speculation.num_speculative_tokens=4"],
    "k=0": ["speculation.num_speculative_tokens=0"],
    "auto": ["speculation.method=auto", "speculation.num_speculative_tokens=auto"],
    "auto, coordinator merges": ["speculation.num_speculative_tokens=auto", "coordination.merge=coordinator"],
    "one at a time": ["engine.max_num_seqs=1"],
    "coordinator merges": ["coordination.merge=coordinator", "speculation.method=model"],
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
@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("int4", "float32")])
def test_same_tokens_in_other_arithmetic(name: str, quantization: str, dtype: str, seed: int) -> None:
    check(name, seed, quantization, dtype)


@pytest.mark.parametrize(("size", "name"), [(2, "model"), (2, "small cache, coordinator merges"), (4, "suffix")])
def test_same_tokens_on_several_ranks(name: str, size: int, seed: int) -> None:
    """The vocabulary and all else in parts: neither what ranks exchange nor their number may show."""
    check(name, seed, "int4", "auto", size)


def anything_else(rng: random.Random, drafters: list[str], token_bytes: int, preempts: bool) -> list[str]:
    """Settings that must not matter, with a cache that is too small for what may run at once.

    Those with `preempts` admit all long requests before any of them ends, and so surely more than fits.
    """
    num_drafts, lease = (rng.randint(1, 3), 1) if preempts else (rng.randint(1, 8), rng.randint(1, 8))
    return [
        f"speculation.method={rng.choice(drafters)}",
        f"speculation.num_speculative_tokens={num_drafts}",
        f"engine.max_num_seqs={rng.randint(6, 24)}",
        f"engine.max_num_batched_tokens={rng.randint(30, 100)}",
        f"engine.block_size={rng.choice([8, 16])}",
        f"engine.kv_cache_memory={rng.choice([208, 240]) * token_bytes}",
        f"coordination.merge={rng.choice(['group', 'coordinator'])}",
        f"coordination.lease={lease}",
    ]


@pytest.mark.parametrize("quantization", ["int4", "none"])
@pytest.mark.parametrize("kind", ["demo", "llama"])
def test_everything_different(kind: str, quantization: str, seed: int, tmp_path: Path) -> None:
    """Hundreds of random requests, each alone on one rank and then amid everything that could be otherwise."""
    rng = random.Random(seed + len(kind + quantization))
    model, drafters = [f"model.quantization={quantization}"], ["ngram", "suffix", "model"]
    target, draft = 2 * 4 * 4 * 64 * 2, 2 * 2 * 2 * 32 * 2  # bytes of a cached token
    if kind == "llama":
        drafters, target, draft = ["ngram", "suffix"], 2 * 2 * 4 * 16 * 2, 0
        sizes = {"vocab_size": 4096, "intermediate_size": 256, "max_position_embeddings": 512}
        directory = save(make("llama", seed, torch.bfloat16, **sizes), tmp_path)
        model += [f"model.target={directory}", "model.group_size=32"]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path("configs/demo/target") / name, tmp_path)
    tokens = text()
    made = draw(rng, 40, tokens, (1, 12, 24, 40))
    large = long(len(made), tokens)
    expected = alone(model, [*large, *made])
    drafted = accepted = readmitted = 0
    for size in (1, rng.choice([2, 4])):
        settings = anything_else(rng, drafters, target // size + draft, preempts=size == 1)
        print(size, *settings)
        rng.shuffle(made)
        job = run(demo_config(*model, *settings), [*large, *made], size)
        found = {index: outcome(completion) for index, completion in job.completions.items()}
        differing = [index for index in expected if found[index] != expected[index]]
        assert not differing and len(found) == len(expected), (size, settings, [r for r in made if r.index in differing])
        drafted += sum(completion.stats.num_drafted for completion in job.completions.values())
        accepted += sum(completion.stats.num_accepted for completion in job.completions.values())
        readmitted += job.admissions - len(expected)
    assert max(len(request.prompt) for request in made) > 100, "no prompt was computed in chunks"
    assert readmitted > 0, "nothing was preempted"
    assert 0 < accepted < drafted, "no draft stood, or each did"


def check(name: str, seed: int, quantization: str, dtype: str, size: int = 1) -> None:
    settings = [s.format(small=small_cache("model" in " ".join(SETTINGS[name]), dtype, size)) for s in SETTINGS[name]]
    config = demo_config(f"model.quantization={quantization}", f"model.dtype={dtype}", *settings)
    job = run(config, requests(seed), size)
    expected = plain(seed, quantization, dtype)
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
