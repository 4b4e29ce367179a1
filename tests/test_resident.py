"""Rounds on the device give what rounds on the host give: the same code runs on a CPU, where there are no graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from test_same_tokens import outcome, requests, small_cache
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.drafting.match import MatchIndex
from runtime.drafting.resident import Lookup, View
from runtime.graphs import Graphs, Work
from runtime.request import Request
from runtime.resident import Resident
from runtime.verify import Decision, Ints
from tests.driver import demo_config, run

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(seed: int) -> list[Request]:
    """Requests of all lengths that ask for nothing but temperature, filters, seed and ends; one of them asks for more."""
    keep = {"temperature", "seed", "max_tokens", "ignore_eos", "stop_token_ids", "stop", "top_p", "top_k", "min_p"}
    made = []
    for request in requests(seed):
        asked = {name: getattr(request.params, name) for name in keep}
        made.append(replace(request, params=type(request.params)(**asked)))
    made[2] = replace(made[2], params=replace(made[2].params, temperature=0.9, top_k=5, top_p=0.95, min_p=0.0))
    made[3] = replace(made[3], params=replace(made[3].params, top_p=0.9, logprobs=1, max_tokens=5))
    return made


@pytest.fixture
def watched() -> Iterator[list[Decision]]:
    """Rounds live on the device wherever they can, and soon again after they couldn't; what they decide."""
    seen: list[Decision] = []
    own = Resident.decisions

    def decisions(self: Resident) -> Iterator[tuple[Decision, Ints]]:
        for decision, sources in own(self):
            seen.append(decision)
            yield decision, sources

    with (
        mock.patch("workers.build.lives_on", return_value=True), mock.patch.object(Resident, "decisions", decisions),
        mock.patch("runtime.resident.AWAY", 1),
    ):  # fmt: skip
        yield seen


SETTINGS = {
    "none": ["speculation.method=none"],
    "ngram": ["speculation.num_speculative_tokens=4"],
    "model": ["speculation.method=model", "speculation.num_speculative_tokens=3"],
    "suffix": ["speculation.method=suffix"],
    "one at a time": ["engine.max_num_seqs=1", "coordination.lease=8"],
    "small budget": ["engine.max_num_batched_tokens=29"],
    "small cache": ["engine.block_size=8", "engine.kv_cache_memory={small}", "speculation.method=model"],
}


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 1) for name in SETTINGS), ("ngram", 2), ("model", 2), ("suffix", 2), ("model", 3)]
)
def test_same_tokens(name: str, size: int, seed: int, watched: list[Decision]) -> None:
    settings = [s.format(small=small_cache(True, "auto", size)) for s in SETTINGS[name]]
    job = run(demo_config(*settings), plain(seed), size)
    rounds, stats = len(watched), job.machine.stats
    assert rounds > 0
    drafted = sum(int(decision.num_drafts.sum()) for decision in watched)
    assert (drafted > 0 and stats.num_accepted > 0) == (name != "none")
    with mock.patch("workers.build.lives_on", return_value=False):
        expected = run(demo_config("speculation.method=none"), plain(seed), size)
    assert len(watched) == rounds
    assert {i: outcome(c) for i, c in job.completions.items()} == {i: outcome(c) for i, c in expected.completions.items()}
    if name == "small cache":
        assert job.admissions > len(job.completions)


@pytest.mark.parametrize(("name", "size"), [("none", 1), ("ngram", 2), ("model", 1)])
def test_what_candidates_leave_open_waits_for_the_host(
    name: str, size: int, seed: int, watched: list[Decision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of two never hold the five likeliest tokens, on one rank or on two."""
    monkeypatch.setattr("runtime.drafting.resident.WIDTH", 2)
    one, other = plain(seed)[2:6:3]
    requests = [replace(one, params=replace(one.params, max_tokens=30, ignore_eos=True, stop=(), stop_token_ids=())), other]
    job = run(demo_config(*SETTINGS[name]), requests, size)
    assert any((decision.num_tokens == 0).any() for decision in watched)
    with mock.patch("workers.build.lives_on", return_value=False):
        expected = run(demo_config("speculation.method=none"), requests, size)
    assert {i: outcome(c) for i, c in job.completions.items()} == {i: outcome(c) for i, c in expected.completions.items()}


REFUSED = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "lift_fresh", "masked_select", "nonzero",
    "unique_dim",
}  # fmt: skip


class Alone(TorchDispatchMode):
    """Refuses what would make a device wait for the host, or read the host's memory, and so end the capture of a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in REFUSED, f"a round asks the host: {func}"
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        assert name not in ("index", "index_put", "index_put_") or all(x is args[0] for x in masks), f"{func} counts a mask"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["none", "ngram", "model"])
def test_nothing_in_a_round_waits_for_the_host(
    name: str, seed: int, watched: list[Decision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters and all; but for the first round of a shape, which no graph captures."""
    run_, alone = Graphs.run, [0]
    known: set[Any] = set()

    def checked(self: Graphs, key: Any, work: Work) -> None:
        if key not in known:
            known.add(key)
            run_(self, key, work)
            return
        alone[0] += 1
        with Alone():
            run_(self, key, work)

    monkeypatch.setattr(Graphs, "run", checked)
    run(demo_config(*SETTINGS[name]), [plain(seed)[2]])
    assert alone[0] > 0 and all(bucket.filters for bucket in known)


def test_lookup_finds_what_the_host_finds(seed: int) -> None:
    rng = random.Random(seed)
    size, width = 48, 6
    for _ in range(20):
        shortest, longest = rng.choice([(1, 3), (2, 4), (1, 1)])
        lengths = [rng.randint(1, size) for _ in range(5)] + [0]
        texts = [[rng.randrange(rng.choice([2, 5])) for _ in range(n)] for n in lengths]
        padded = [text + [rng.randrange(5) for _ in range(size - len(text))] for text in texts]
        history = torch.tensor(padded, dtype=torch.int32)
        none = torch.zeros(6, dtype=torch.int64)
        view = View(history, torch.tensor(lengths), none, none[:, None].int(), none.float(), none)
        found, sources = (each.tolist() for each in Lookup(shortest, longest).propose(view, width))
        for text, drafts, source in zip(texts, found, sources, strict=True):
            index = MatchIndex(shortest, longest)
            index.extend(text)
            end, length = index.find(text)
            assert (drafts, source) == (index.copy(end, width) if length else [-1] * width, length)


def test_graphs_capture_on_the_second_run_and_forget_the_oldest(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []

    def capture(work):  # type: ignore[no-untyped-def]
        work()
        if log.pop() == "odd":
            raise RuntimeError("no room")
        log.append("captured")
        return lambda: log.append("replayed")

    def run_(graphs: Graphs, key: str) -> str:
        log.clear()
        graphs.run(key, lambda: log.append(key))
        return " ".join(log)

    graphs = Graphs(capture, most=2)
    assert [run_(graphs, "a") for _ in range(3)] == ["a", "captured replayed", "replayed"]
    assert [run_(graphs, "odd") for _ in range(3)] == ["odd"] * 3
    assert "cannot be captured" in caplog.text and len(caplog.records) == 1
    assert [run_(graphs, key) for key in "bbcc"] == ["b", "captured replayed", "c", "captured replayed"]
    assert [run_(graphs, key) for key in "cba"] == ["replayed", "replayed", "captured replayed"]
    assert run_(Graphs(None), "a") == "a"
