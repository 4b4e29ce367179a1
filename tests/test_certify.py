"""Certified output is what the 16-bit model gives alone, token for token, however the int4 model gets there."""

from __future__ import annotations

import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from configs.load import ConfigError, load
from runtime.request import Request, SamplingParams
from tests.driver import Outcome, demo_config, run
from tests.driver import start as start_ranks
from tests.jobs import finish, launcher_command, start, write_requests
from tests.jobs import run as run_job
from tests.seeds import fresh_seed
from tests.test_job import kill
from tests.test_same_tokens import outcome, wishes
from tests.tiny_models import VOCABULARY, make, save
from workers.models import BuildRefused

COUNT, LONG = 120, 4
SOME = 40  # of them for several ranks, which are threads here and wait for each other
FULL = "verification.certify=full"
WIDE = ("model.target=configs/demo/target", "model.quantization=none")
CERTIFIED = (FULL, "verification.reference=configs/demo/target")


@pytest.fixture(scope="module")
def seed() -> int:
    """One seed for all tests here, so that they share what the 16-bit model gives."""
    return fresh_seed()


@cache
def requests(seed: int) -> tuple[Request, ...]:
    """Pieces of this repository's code as prompts, every other one sampled, some with more wishes, a few long."""
    rng = random.Random(seed)
    with open("runtime/coordinator.py") as file:
        tokens = AutoTokenizer.from_pretrained("configs/demo/target")(file.read()).input_ids
    made = []
    for index in range(COUNT):
        start, length = rng.randrange(len(tokens) - 100), rng.choice([1, 2, 15, 16, 17, 60])
        long = index < LONG
        params = SamplingParams(
            temperature=0.8 * (index % 2),
            seed=rng.randrange(2**63),
            max_tokens=90 if long else rng.choice([1, 2, 9, 17]),
            ignore_eos=long or rng.random() < 0.5,
            stop_token_ids=() if long else tuple(rng.sample(range(300), 2)),
            stop=(f" {rng.randrange(300)} ",) if not long and rng.random() < 0.3 else (),
            **(wishes(rng, tokens) if index % 3 == 0 and not long else {}),
        )
        made.append(Request(index, tuple(tokens[start : start + length]), params))
    return tuple(made)


def asked(seed: int, size: int) -> tuple[Request, ...]:
    return requests(seed) if size == 1 else requests(seed)[:SOME]


def answers(job: Outcome) -> dict[int, tuple[Any, ...]]:
    return {index: outcome(completion) for index, completion in job.completions.items()}


@cache
def alone(seed: int, size: int) -> dict[int, tuple[Any, ...]]:
    """What the 16-bit model gives without any speculation."""
    return answers(run(demo_config(*WIDE, "speculation.method=none"), asked(seed, size), size))


SETTINGS = {
    "chosen windows": [],
    "a draft model": ["speculation.method=model", "verification.certify_window=33", "coordination.lease=3"],
    "coordinator merges": [
        "speculation.method=suffix", "coordination.merge=coordinator", "engine.max_num_seqs=5",
        "verification.certify_window=16",
    ],
    "weights on the host": [
        "verification.certify_weights=host", "engine.max_num_batched_tokens=29", "verification.certify_window=9",
    ],
    "small cache": [
        "engine.kv_cache_memory={small}", "engine.block_size=8", "verification.certify_window=7", "speculation.method=none",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 1) for name in SETTINGS), ("chosen windows", 2), ("coordinator merges", 2)]
)
def test_it_is_what_the_16_bit_model_gives(name: str, size: int, seed: int) -> None:
    small = 240 * 2 * 4 * 4 * 64 * 2 // size  # bytes of 240 tokens: keys and values, layers, KV heads, head_dim
    job = run(demo_config(*CERTIFIED, *(setting.format(small=small) for setting in SETTINGS[name])), asked(seed, size), size)
    assert answers(job) == alone(seed, size)
    assert all(group.pool.num_free == group.pool.size for group in job.machine._ready.values())
    if name != "chosen windows":  # which are empty where this machine's int4 rounds come out no cheaper
        assert job.machine.stats.num_accepted > 0, "no token of the int4 model stood"
    if name == "small cache":
        assert job.admissions > COUNT, "the cache was large enough after all"


def test_windows_are_chosen_from_what_both_models_take() -> None:
    (_, _, hello) = start_ranks(demo_config(*CERTIFIED), 1)[0]
    assert hello.costs is not None and min(hello.costs.seconds) > 0 and hello.costs.step > 0
    assert start_ranks(demo_config(*CERTIFIED, "verification.certify_window=4"), 1)[0][2].costs is None


def test_the_int4_model_may_live_on_the_device(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.build.lives_on", lambda device: True)
    assert answers(run(demo_config(*CERTIFIED, "verification.certify_window=9"), requests(seed))) == alone(seed, 1)


@pytest.mark.parametrize("size", [1, 2])
def test_models_that_hardly_agree(size: int, seed: int, tmp_path: Path) -> None:
    """A Llama of random weights in four bits is wrong most of the time: nearly every window is rolled back."""
    directory = save(make("llama", seed, torch.bfloat16), tmp_path)
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 40))) for _ in range(40)]
    some = [
        Request(i, prompt, SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=20)) for i, prompt in enumerate(prompts)
    ]
    settings = [f"model.target={directory}", "model.group_size=32", "engine.max_model_len=64", "verification.certify_window=6"]
    certified = run(demo_config(*settings, FULL), some, size)
    plain = run(demo_config(*settings, "model.quantization=none", "speculation.method=none"), some, size)
    assert answers(certified) == answers(plain)
    assert certified.machine.stats.draft_acceptance_rate < 0.9


def test_certified_rows_bear_the_fingerprint_of_the_16_bit_model_even_after_a_kill(tmp_path: Path, seed: int) -> None:
    prompts = write_requests(tmp_path / "in.jsonl", 6)
    plain, certified = tmp_path / "plain", tmp_path / "certified"
    plain.mkdir(), certified.mkdir()
    expected = run_job("python", 1, plain, "parallel.tensor=1", *WIDE, prompts=prompts)
    words = ["parallel.tensor=1", *CERTIFIED, "engine.max_num_seqs=2", "verification.certify_window=16"]
    job = start(launcher_command("python", 1), certified, *words, prompts=prompts)
    output, after = certified / "out.jsonl", random.Random(seed).randrange(5)
    while job.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") >= after):
        os.sched_yield()
    if job.poll() is None:
        kill(job.pid, "all")
    finish(job)
    written = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(written[:after]))  # as if none had come since, so that there is something left to do
    assert run_job("python", 1, certified, *words, prompts=prompts) == expected
    said = json.loads((certified / "summary.json").read_text())
    told, inner = said["certification"], said["certification"]["int4_speculation"]
    assert 0 < told["share_that_stood"] <= 1 <= told["mean_window"] <= 16
    assert told["tokens_per_check"] == pytest.approx(1 + told["share_that_stood"] * told["mean_window"])
    assert inner["num_draft_tokens"] >= inner["num_accepted_draft_tokens"] > 0
    assert round(inner["mean_acceptance_length"] * sum(inner["acceptance_histogram"])) >= said["num_draft_tokens"]
    assert json.loads((plain / "summary.json").read_text())["certification"] is None


@pytest.mark.parametrize(
    ("reference", "quantized", "said"),
    [("llama", True, "verification.reference"), ("other heads", False, "share a cache"), ("other words", False, "vocabulary")],
)
def test_models_that_do_not_belong_together_are_refused(reference: str, quantized: bool, said: str, tmp_path: Path) -> None:
    target, other = save(make("llama", 0), tmp_path / "target"), tmp_path / "reference"
    save(make("llama", 0, **({"num_key_value_heads": 2} if reference == "other heads" else {})), other)
    for directory, words in (target, {"a": 0}), (other, {"b" if reference == "other words" else "a": 0}):
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    if quantized:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    settings = [f"model.target={target}", f"verification.reference={other}", FULL]
    settings += ["model.group_size=32", "engine.max_model_len=64"]
    with pytest.raises(BuildRefused, match=said):
        run(demo_config(*settings), [])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([FULL, "model.quantization=none"], "nothing to check with model.quantization: none"),
        (["verification.reference=x"], "needs verification.certify: full"),
        ([FULL, "verification.certify_window=64", "engine.max_num_batched_tokens=64"], "certify_window + 1 = 65"),
        ([FULL, "speculation.num_speculative_tokens=9", "verification.certify_window=1", "engine.max_num_batched_tokens=9"],
         "num_speculative_tokens + 1 = 10"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("+", r"\+")):
        load(None, ["model.target=x", *overrides])
