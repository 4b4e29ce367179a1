"""Whole jobs: every launcher, both merges, killed and started again, refused."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.encoder import copy_seed
from tests.jobs import available, finish, launcher_command, rows, run, start, write_requests

COUNT = 10


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_requests(tmp_path_factory.mktemp("input") / "in.jsonl", COUNT)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> dict[int, dict[str, Any]]:
    """Two ranks, no speculation, one sequence at a time: what every other way must give."""
    directory = tmp_path_factory.mktemp("plain")
    expected = run("torchrun", 2, directory, "speculation.method=none", "engine.max_num_seqs=1", prompts=prompts)
    assert len(expected) == COUNT and all(row["error"] is None for row in expected.values())
    return expected


@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ("torchrun", ["speculation.method=model", "coordination.merge=coordinator"]),
        ("deepspeed", ["speculation.method=ngram", "coordination.lease=8"]),
        ("mpirun", ["speculation.method=suffix", "coordination.lease=1"]),
    ],
)
def test_same_output_under_every_launcher(
    launcher: str, overrides: list[str], tmp_path: Path, prompts: Path, plain: dict[int, dict[str, Any]]
) -> None:
    if not available(launcher):
        pytest.skip(f"{launcher} is not installed")
    drafts = "speculation.num_speculative_tokens=3"  # of which some stand; chosen ones may be none
    assert run(launcher, 2, tmp_path, drafts, *overrides, prompts=prompts) == plain
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["output_tokens"] == sum(r["response"]["body"]["usage"]["completion_tokens"] for r in plain.values())
    assert summary["tokens_per_second"] > 0 and summary["mean_acceptance_length"] > 1
    assert set(summary["peak_memory_bytes"]) == {"0", "1"}


def test_two_groups_of_one_rank_give_what_one_rank_gives(tmp_path: Path, prompts: Path) -> None:
    alone = tmp_path / "alone"
    pair = tmp_path / "pair"
    expected = run("python", 1, alone, "parallel.tensor=1", "engine.threads=1", prompts=prompts)
    assert run("torchrun", 2, pair, "parallel.tensor=1", "engine.threads=1", prompts=prompts) == expected


def test_killed_at_a_random_moment_and_started_again(
    tmp_path: Path, prompts: Path, plain: dict[int, dict[str, Any]], seed: int
) -> None:
    """Kills all processes of the job, one rank, or the coordinator, when a random number of results is on disk."""
    rng = random.Random(seed)
    victim = rng.choice(["all", "rank", "coordinator"])
    after = rng.randrange(COUNT - 1)
    print(f"kills {victim} after {after} results")
    job = start(
        launcher_command("torchrun", 2), tmp_path, "engine.max_num_seqs=2", "coordination.timeout=5", prompts=prompts
    )
    output = tmp_path / "out.jsonl"
    while job.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") >= after):
        os.sched_yield()
    if job.poll() is None:
        kill(job.pid, victim)
    code, printed = finish(job)
    assert code != 0 or len(rows(tmp_path)) == COUNT, printed
    assert run("torchrun", 2, tmp_path, prompts=prompts) == plain


def kill(pid: int, victim: str) -> None:
    family = psutil.Process(pid).children(recursive=True)
    coordinators = [p for p in family if "coordinator" in p.cmdline()]
    ranks = [p for p in family if "launcher/main.py" in p.cmdline() and p not in coordinators]
    for process in {"all": [*family, psutil.Process(pid)], "rank": ranks[-1:], "coordinator": coordinators}[victim]:
        process.send_signal(signal.SIGKILL)


def test_continuations_are_requests_with_seeds_of_their_own(tmp_path: Path) -> None:
    prompt = Path("runtime/sequence.py").read_text()[:300]
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0.9, "stop": ["\n\n"], "include_stop_str_in_output": True}
    bodies = [body | {"seed": 7, "n": 3}, *(body | {"seed": seed} for seed in (7, copy_seed(7, 1), copy_seed(7, 2)))]
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": each})
        for i, each in enumerate(bodies)
    ]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("\n".join(lines))
    found = run("python", 1, tmp_path, "parallel.tensor=1", prompts=prompts)
    answers = [found[index]["response"]["body"] for index in range(4)]
    together, *alone = answers
    assert len({answer["system_fingerprint"] for answer in answers}) == 1
    assert [choice | {"index": 0} for choice in together["choices"]] == [answer["choices"][0] for answer in alone]
    assert together["usage"]["completion_tokens"] == sum(answer["usage"]["completion_tokens"] for answer in alone)
    assert together["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]


def test_bad_lines_become_error_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    prompts = write_requests(tmp_path / "in.jsonl", 3)
    good = prompts.read_text().splitlines()
    bad = [
        "{not json",
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": ""}}),
        json.dumps({"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "best_off": 2}}),
        json.dumps({"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x " * 3000}}),
    ]
    prompts.write_text("\n".join([good[0], *bad, *good[1:]]) + "\n")
    found = run("python", 1, tmp_path, "parallel.tensor=1", prompts=prompts)
    assert [found[i]["error"] is None for i in range(7)] == [True, False, False, False, False, True, True]
    assert "best_off" in found[3]["error"]["message"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.tagret=x"], "did you mean target"),
        (["parallel.tensor=3"], "cannot be divided into groups of 3"),
        (["model.target=/nowhere"], "/nowhere"),
        (["engine.kv_cache_memory=10B"], "holds no block"),
        (["coordination.endpoint=tcp://0.0.0.0:5555"], "workers.keys"),
    ],
)
def test_a_job_that_cannot_run_says_why_and_exits_2(overrides: list[str], said: str, tmp_path: Path, prompts: Path) -> None:
    words = ["parallel.tensor=1", *overrides]
    code, output = finish(start(launcher_command("python", 1), tmp_path, *words, prompts=prompts))
    assert (code, said in output) == (2, True), output


def test_duplicate_ids_and_foreign_output_are_refused(tmp_path: Path, prompts: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    line = prompts.read_text().splitlines()[0]
    twice.write_text(f"{line}\n{line}\n")
    code, output = finish(start(launcher_command("python", 1), tmp_path, "parallel.tensor=1", prompts=twice))
    assert code == 2 and "request-0" in output
    (tmp_path / "out.jsonl").write_text('{"somebody": "else"}\n')
    code, output = finish(start(launcher_command("python", 1), tmp_path, "parallel.tensor=1", prompts=prompts))
    assert code == 2 and "out.jsonl" in output
    assert (tmp_path / "out.jsonl").read_text() == '{"somebody": "else"}\n'


def test_a_folder_that_cannot_be_made_is_named(prompts: Path) -> None:
    code, output = finish(start(launcher_command("python", 1), prompts / "below", "parallel.tensor=1", prompts=prompts))
    assert code == 2 and f"cannot make the folder of {prompts / 'below'}" in output
