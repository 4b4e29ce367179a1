"""The coordinator's process without processes: from lines to requests, from completions to rows, with lists for sockets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

from configs.load import load
from launcher.batch import scan
from launcher.coordinate import Job, fingerprint, system_fingerprint
from launcher.defaults import Defaults
from launcher.encoder import copy_seed
from launcher.journal import Journal
from runtime.coordinator import Coordinator
from runtime.events import Finished, Refused
from runtime.messages import Farewell, Hello, Message
from runtime.request import Completion, Request, SpeculationStats
from runtime.tokenizer import load_tokenizer
from tests.driver import demo_config, load_once
from tests.events import coordinator, hello, ready
from workers.build import Place, build
from workers.shell import OUTCOMES, Shell
from workers.transport import Server

TARGET = "configs/demo/target"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TARGET)


def body(**params: Any) -> str:
    params = {"prompt": "def f(", "seed": 3, **params}
    return json.dumps({"custom_id": f"id {params.pop('name')}", "method": "POST", "url": "/v1/completions", "body": params})


def make_job(directory: Path, lines: list[str], tokenizer: Any) -> Job:
    (directory / "in.jsonl").write_text("\n".join(lines) + "\n")
    config = load(None, [f"model.target={TARGET}"])
    found = scan(directory / "in.jsonl")
    journal = Journal.open(directory / "out.jsonl", found, fingerprint(config, Defaults()))
    machine = coordinator()
    for rank in (0, 1):
        machine.handle(hello(rank, vocab_size=4096, max_model_len=512, fingerprint="abc"))
    return Job(config, found, journal, machine, tokenizer, Defaults())


def finished(request: Request) -> Finished:
    tokens = tuple(range(10, 12 + request.copy))
    stats = SpeculationStats()
    return Finished(Completion(request.index, len(request.prompt), tokens, f"{request.copy}", "stop", stats, request.copy))


def rows(directory: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def test_every_continuation_is_a_request_and_all_of_them_one_row(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    counts = [1, 3, 2, 5]
    lines = [body(name=i, n=n) for i, n in enumerate(counts)]
    lines.insert(2, body(name="bad", n=0))
    job = make_job(tmp_path, lines, tokenizer)
    items = list(job.requests())
    requests = [item for item in items if isinstance(item, Request)]
    expected = [(index, copy) for index, n in zip((0, 1, 3, 4), counts, strict=True) for copy in range(n)]
    assert [(request.index, request.copy) for request in requests] == expected
    assert [r.params.seed for r in requests[1:4]] == [3, copy_seed(3, 1), copy_seed(3, 2)]
    outcomes: list[Any] = [finished(r) for r in requests] + [item for item in items if not isinstance(item, Request)]
    rng.shuffle(outcomes)
    while outcomes:
        count = rng.randint(1, 3)
        job.keep(outcomes[:count])
        outcomes = outcomes[count:]
    job.journal.close()
    found = rows(tmp_path)
    assert "n: expected a whole number from 1 to 128" in found["id bad"]["error"]["message"]
    for i, n in enumerate(counts):
        answer = found[f"id {i}"]["response"]["body"]
        assert [choice["text"] for choice in answer["choices"]] == [str(copy) for copy in range(n)]
        assert answer["usage"]["completion_tokens"] == sum(2 + copy for copy in range(n))
        assert answer["system_fingerprint"] == job.writer.fingerprint
    assert job.prompt_tokens == 4 * len(requests[0].prompt) and job.output_tokens == sum(
        row["response"]["body"]["usage"]["completion_tokens"] for row in found.values() if row["response"]
    )


def test_a_row_waits_for_its_last_continuation_and_is_begun_anew_by_the_next_run(tmp_path: Path, tokenizer: Any) -> None:
    lines = [body(name=i, n=3) for i in range(2)]
    job = make_job(tmp_path, lines, tokenizer)
    requests = [item for item in job.requests() if isinstance(item, Request)]
    job.keep([finished(r) for r in requests[:5]])
    job.journal.close()
    assert set(rows(tmp_path)) == {"id 0"}
    again = make_job(tmp_path, lines, tokenizer)
    left = [item for item in again.requests() if isinstance(item, Request)]
    assert left == requests[3:], "all of the unfinished row, none of the finished one"
    again.keep([finished(r) for r in left])
    again.journal.close()
    assert set(rows(tmp_path)) == {"id 0", "id 1"}


def test_a_refused_prompt_is_one_row_however_many_copies(tmp_path: Path, tokenizer: Any) -> None:
    job = make_job(tmp_path, [body(name=0, n=3)], tokenizer)
    source = job.requests()
    next(source)
    job.keep([Refused(0, "too long")])
    assert len(list(source)) == 2
    job.keep([Refused(0, "too long"), Refused(0, "too long")])
    job.journal.close()
    assert rows(tmp_path)["id 0"]["error"] == {"code": "capacity_exceeded", "message": "too long"}


class Nobody:
    """A server whose ranks only say goodbye."""

    def __init__(self, machine: Coordinator) -> None:
        self.machine, self.left = machine, list(machine.ranks)

    def receive(self, timeout: float | None) -> tuple[bytes, Message] | None:
        if self.machine.stop is None or not self.left:
            return None
        return b"", Farewell(self.left.pop(), 0, {}, 0)

    def send(self, identity: bytes, message: Message) -> bool:
        return True


def test_many_bad_lines_share_few_writes() -> None:
    """A turn reads a bounded number of them, so that ranks are heard in between, and writes them all at once."""
    machine = ready()
    lines = 10 * OUTCOMES + 7
    calls: list[list[Any]] = []
    shell = Shell(machine, cast(Server, Nobody(machine)), load(None, ["model.target=x"]).coordination)
    shell.run(iter([{"row": number} for number in range(lines)]), calls.append)
    assert [outcome["row"] for outcomes in calls for outcome in outcomes] == list(range(lines))
    assert len(calls) == 11 and max(map(len, calls)) == OUTCOMES


def test_rows_are_marked_with_what_makes_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    base = system_fingerprint(tmp_path, {"a"}, Defaults())
    assert base == system_fingerprint(tmp_path, {"a"}, Defaults()) and base.startswith("fp_") and len(base) == 15
    others = [system_fingerprint(tmp_path, {"b"}, Defaults()), system_fingerprint(tmp_path, {"a"}, Defaults(top_p=0.5))]
    (tmp_path / "tokenizer.json").write_text("{} ")
    others.append(system_fingerprint(tmp_path, {"a"}, Defaults()))
    assert len({base, *others}) == 4


def test_what_ranks_say_of_themselves_leaves_out_what_decides_nothing() -> None:
    def said(*overrides: str) -> Hello:
        with mock.patch("workers.models.load_model", load_once):
            return build(demo_config(*overrides), Place(0, 0, [(0,)], 0, 1, True, "test"))[1]

    base = said()
    for same in ("speculation.method=suffix", "engine.block_size=8", "coordination.merge=coordinator", "seed=5"):
        assert said(same).fingerprint == base.fingerprint, same
    for other in ("model.quantization=none", "engine.max_model_len=100", "model.symmetric=false", "engine.kv_cache_dtype=int8"):
        assert said(other).fingerprint != base.fingerprint, other
