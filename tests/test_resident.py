"""Rounds on the device give what rounds on the host give: the same code runs on a CPU, where there are no graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from typing import Any
from unittest import mock

import pytest
import torch
from test_same_tokens import outcome, requests, small_cache
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.blocks import blocks_for
from runtime.comm import Solo
from runtime.drafting.drafter import SuffixDrafter
from runtime.drafting.match import MatchIndex
from runtime.drafting.model import ModelDrafter
from runtime.drafting.resident import Both, Lookup, Recall, Replica, View
from runtime.graphs import Graphs, Work
from runtime.kv_cache import CacheShape, KVCache
from runtime.request import Request
from runtime.resident import Resident
from runtime.scheduler import Work as Share
from runtime.sequence import Sampling, Sequence
from runtime.verify import Decision, Ints
from tests.alone import alone
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
    "auto": ["speculation.method=auto", "speculation.num_speculative_tokens=3"],
    "one at a time": ["engine.max_num_seqs=1", "coordination.lease=8"],
    "small budget": ["engine.max_num_batched_tokens=29"],
    "small cache": ["engine.block_size=8", "engine.kv_cache_memory={small}", "speculation.method=model"],
}


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 1) for name in SETTINGS), ("ngram", 2), ("model", 2), ("suffix", 2), ("auto", 2), ("model", 3)]
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


@pytest.mark.parametrize("name", ["none", "ngram", "model", "auto"])
def test_nothing_in_a_round_waits_for_the_host(
    name: str, seed: int, watched: list[Decision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters and all; but for the first round of a shape, which no graph captures."""
    run_, times = Graphs.run, [0]
    known: set[Any] = set()

    def checked(self: Graphs, key: Any, work: Work) -> None:
        if key not in known:
            known.add(key)
            run_(self, key, work)
            return
        times[0] += 1
        with alone():
            run_(self, key, work)

    monkeypatch.setattr(Graphs, "run", checked)
    run(demo_config(*SETTINGS[name]), [plain(seed)[2]])
    assert times[0] > 0 and all(bucket.filters for bucket in known)


class Unwaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device, for which "meta" stands in: all copies but from pinned memory."""

    def __init__(self, pinned: list[Tensor]) -> None:
        super().__init__()
        self.pinned, self.copies = pinned, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        assert name != "_to_copy" or kwargs.get("device") is None or {torch.device(kwargs["device"]).type} == devices, func
        if len(devices) > 1:
            target, source, *rest = args
            assert name == "copy_" and rest == [True] and target.device.type == "meta", func
            assert any(source.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in self.pinned), func
            # Else torch copies by way of a tensor that it makes, or converts before it copies.
            assert target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype, func
            self.copies += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["none", "lookup", "recall", "both"])
def test_nothing_before_a_round_waits_for_the_device(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New sequences, then their next lease, and the rounds of each; a tensor of "meta" cannot be read at all."""
    rng, device, longest = random.Random(seed), torch.device("meta"), 100
    made: list[Tensor] = []
    computed: list[int] = []

    def pinned(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Tensor:
        assert where == device
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    monkeypatch.setattr("runtime.roster.pinned", pinned)
    monkeypatch.setattr("runtime.drafting.resident.pinned", pinned)
    # What is new the small model computes first, launch by launch.
    monkeypatch.setattr(ModelDrafter, "_compute", lambda self, sequence, start, stop: computed.append(sequence.slot))
    anything: Any = None
    cache, lookup = KVCache(CacheShape(1, 1, 4), 40, 8, torch.float32, device), Lookup(1, 3)
    recall = Recall(SuffixDrafter(1, 3), lookup, 4, 3, device)
    chain = Replica(ModelDrafter(anything, cache, 64, 7), Solo())
    proposer = {"none": None, "lookup": lookup, "recall": recall, "both": Both(recall, chain)}[name]
    resident = Resident(anything, cache, Solo(), proposer, Graphs(None), 7, 4, longest, 64)
    sequences = [
        Sequence(
            index=slot, slot=slot, tokens=[rng.randrange(9) for _ in range(count)], num_prompt=count, limit=longest,
            ends=frozenset({3}), sampling=Sampling(top_k=3, temperature=1.0), num_computed=count - 1,
            blocks=list(range(blocks_for(count + 9, 8))), allowance=[3] * 7,
        )
        for slot, count in enumerate(rng.randint(1, 60) for _ in range(3))
    ]  # fmt: skip
    looks = name in ("recall", "both")
    for copies in (3 + 1, 1):  # the tokens of each that the device hasn't got, and the table
        with Unwaiting(made) as mode:
            resident.begin(sequences, 4)
            assert mode.copies == copies + looks
            resident.again()
            assert mode.copies == copies + 2 * looks
        assert computed == ([0, 1, 2] if name == "both" else [])


@pytest.mark.parametrize("name", ["model", "auto"])
def test_drafts_of_the_small_model_are_the_host_s(name: str, seed: int, watched: list[Decision]) -> None:
    """Over many leases, for none of which it computes anything anew."""
    request = plain(seed)[1]
    params = replace(request.params, top_k=0, top_p=1.0, min_p=0.0, max_tokens=40, ignore_eos=True, stop=(), stop_token_ids=())
    settings = [*SETTINGS[name], "speculation.prompt_lookup_min=2"]
    on_host: list[int] = []
    own = ModelDrafter._compute

    def compute(self: ModelDrafter, sequence: Sequence, start: int, stop: int) -> int:
        on_host.append(stop - start)
        return own(self, sequence, start, stop)

    with mock.patch.object(ModelDrafter, "_compute", compute):
        job = run(demo_config(*settings), [replace(request, params=params)])
    assert len(watched) > 4 and sum(on_host) <= len(request.prompt)
    with mock.patch("workers.build.lives_on", return_value=False):
        host = run(demo_config(*settings), [replace(request, params=params)])
    found, wanted = job.machine.stats, host.machine.stats
    if name == "model":  # else matches, which the host gives up after a number of places, may come first
        assert (found.num_drafted, found.num_accepted) == (wanted.num_drafted, wanted.num_accepted)


def test_recall_drafts_what_the_host_drafts(seed: int) -> None:
    """With nothing decided since the host looked, with what it found, and with something else."""
    rng = random.Random(seed)
    longest, count = 3, 4
    for _ in range(20):
        shortest = rng.randint(1, longest)
        drafter, job = SuffixDrafter(shortest, longest), MatchIndex(shortest, longest)
        recall = Recall(drafter, Lookup(shortest, longest), 8, count + 2, torch.device("cpu"))
        for index in range(3):
            text = [rng.randrange(6) for _ in range(rng.randint(5, 80))]
            drafter.release(sequence_of(text, index))
            job.extend([*text, -1])
        rows = [sequence_of([rng.randrange(6) for _ in range(rng.randint(1, 40))], slot) for slot in range(6)]
        for sequence in rows:
            sequence.allowance = [rng.choice([0, count]) for _ in range(2 * longest)]
        recall.settle([*rows, None], count, set())
        plain = drafter.propose([Share(s, s.num_computed, 1, count, True) for s in rows])
        wanted = [(d.tokens, d.source) for d in plain]
        for i, sequence in enumerate(rows[2:], 2):
            end, length = job.find(sequence.tokens)
            text = job.copy(end, 2 * count + 1) if length else []
            come = list(takewhile(lambda token: token >= 0, text)) if i < 4 else [rng.randrange(6) for _ in range(9)]
            come = come[: rng.randint(1, count + 1)]
            sequence.tokens.extend(come)
            held = min(length + len(come), longest) if length and text[: len(come)] == come else 0
            own = MatchIndex(shortest, longest)
            own.extend(sequence.tokens)
            end, length = own.find(sequence.tokens)
            work = Share(sequence, 0, 1, count, True)
            choices = [(own.copy(end, count), length)] * (length > 0)
            choices += [(text[len(come) :][:count], longest + held)] * (held > 0)
            best = max(choices, key=lambda c: (work.most(c[1]) > 0, (c[1] - 1) % longest), default=([], 0))
            wanted[i] = best[0][: work.most(best[1]) if best[1] else 0], best[1]
        size = max(s.num_committed for s in rows)
        history = torch.tensor([s.tokens + [5] * (size - s.num_committed) for s in rows] + [[5] * size], dtype=torch.int32)
        lengths = torch.tensor([s.num_committed for s in rows] + [0])
        allowances = torch.tensor([[0, *s.allowance] for s in rows] + [[0] * (2 * longest + 1)])
        none = torch.zeros(7, dtype=torch.int64)
        view = View(history, lengths, none, none[:, None].int(), none.float(), none, allowances)
        found, sources = (each.tolist() for each in recall.propose(view, count))
        for i, (tokens, source) in enumerate([*wanted, ([], 0)]):
            assert sources[i] == source, i
            assert found[i][: len(tokens)] == tokens, i


def sequence_of(tokens: list[int], slot: int) -> Sequence:
    return Sequence(
        index=slot, slot=slot, tokens=tokens, num_prompt=1, limit=999, ends=frozenset(), sampling=Sampling(),
        num_computed=len(tokens) - 1,
    )  # fmt: skip


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
        view = View(history, torch.tensor(lengths), none, none[:, None].int(), none.float(), none, none[:, None])
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
