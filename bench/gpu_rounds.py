"""Rounds on a device beside the least time in which their bytes can be read; a part of `python -m bench.gpu`.

    python -m bench.gpu_rounds                    # needs CUDA; a model of Qwen3-8B's shape is made first, 16 GB
    python -m bench.gpu_rounds --dry-run          # the demo's model on any machine: does it run at all

Whole jobs come first, on that model - whose text is the demo model's - in the four cells. Then, for rounds, sequences of random
tokens stand at a context that nobody computed: a round costs the same whatever the cache holds. Drafts are random too, so that
every round checks k of them and decides one token. Rounds come in leases, as a rank runs them, and what passes between two
leases is in their time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.enlarge import SOURCE, enlarge
from bench.goals import Reached
from bench.shapes import SHAPES
from bench.tables import table
from configs.schema import ModelConfig
from runtime.blocks import blocks_for
from runtime.comm import Solo
from runtime.drafting.resident import MANY, View
from runtime.graphs import Graphs, capture_on
from runtime.kv_cache import KVCache
from runtime.model import Model, load_model
from runtime.resident import Resident
from runtime.sequence import Sampling
from runtime.sequence import Sequence as Running

BLOCK = 16
LEASE, LEASES = 4, 3  # rounds; leases that are timed, after one that isn't
CONTENDERS = {"int4": "int4", "16-bit": "none"}  # name -> model.quantization
PROMPTS = Path("configs/demo/prompts.jsonl")


class RandomDrafts:
    """Proposes tokens by chance: the most work a round can have."""

    ahead = MANY

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def settle(self, rows: list[Running | None], count: int, ready: set[int]) -> None:
        pass

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        step = torch.arange(count, device=view.length.device)
        drafts = (view.length[:, None] * 7919 + view.seeds[:, None] * 104729 + step * 31) % self._vocab_size
        return drafts, torch.ones_like(view.length)


@dataclass(frozen=True, slots=True)
class Cell:
    """What a round is about."""

    batch: int
    drafts: int
    context: int

    @property
    def longest(self) -> int:
        return self.context + (LEASES + 2) * LEASE * (self.drafts + 1)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one round: seconds of wall time, those the host was busy, the share of time in which the device had nothing to do,
    and the bytes it had to read."""

    seconds: float
    host: float
    idle: float
    nbytes: int


def measure(model: Model, cell: Cell) -> Timing:
    """The mean round of some leases. Raises torch.OutOfMemoryError."""
    rng = random.Random(0)
    blocks = blocks_for(cell.longest, BLOCK)
    cache = KVCache(model.cache_shape, cell.batch * blocks, BLOCK, model.dtype, model.device)
    proposer = RandomDrafts(model.vocab_size) if cell.drafts else None
    graphs = Graphs(capture_on(model.device))
    budget = cell.batch * (cell.drafts + 1)
    resident = Resident(model, cache, Solo(), proposer, graphs, 1, cell.batch, cell.longest, budget)
    sequences = [
        Running(
            index=slot, slot=slot, tokens=rng.choices(range(model.vocab_size), k=cell.context), num_prompt=cell.context,
            limit=cell.longest, ends=frozenset(), sampling=Sampling(seed=slot), num_computed=cell.context - 1,
            blocks=list(range(slot * blocks, (slot + 1) * blocks)), allowance=[cell.drafts],
        )
        for slot in range(cell.batch)
    ]  # fmt: skip
    _lease(resident, sequences)  # compiled, captured, replayed
    start = time.perf_counter()
    spans = [span for _ in range(LEASES) for span in _lease(resident, sequences)[1:]]
    wall = (time.perf_counter() - start) / (LEASES * LEASE)
    on_device = statistics.median(span() for span in spans)
    kv = 2 * model.cache_shape.layers * model.cache_shape.kv_heads * model.cache_shape.head_dim * model.dtype.itemsize
    nbytes = model.bytes_read + cell.batch * cell.context * kv
    return Timing(wall, _host(resident, sequences), max(0.0, 1 - on_device / wall), nbytes)


def _lease(resident: Resident, sequences: list[Running]) -> list[Callable[[], float]]:
    """Runs a lease of rounds; what it returns tells the seconds the device took for each."""
    resident.begin(sequences, LEASE)
    spans = [_timed(resident) for _ in range(LEASE)]
    _hear(resident, sequences)
    return spans


def _hear(resident: Resident, sequences: list[Running]) -> None:
    for decision, _ in resident.decisions():
        for slot, tokens in zip(decision.slots.tolist(), decision.each(), strict=True):
            sequences[slot].commit(tokens)


def _host(resident: Resident, sequences: list[Running]) -> float:
    """Seconds of a round in which the host is busy, in one more lease, but for waiting; nothing on a CPU, which does it all."""
    if resident.device.type != "cuda":
        return 0.0
    start = time.perf_counter()
    resident.begin(sequences, LEASE)
    for _ in range(LEASE):
        resident.launch()
    busy = time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    _hear(resident, sequences)
    return (busy + time.perf_counter() - start) / LEASE


def _timed(resident: Resident) -> Callable[[], float]:
    """Launches a round; what it returns tells, once the round is over, the seconds the device took."""
    if resident.device.type != "cuda":
        start = time.perf_counter()
        resident.launch()
        seconds = time.perf_counter() - start
        return lambda: seconds
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    resident.launch()
    after.record()
    return lambda: before.elapsed_time(after) / 1e3


def cells(dry: bool) -> Iterator[Cell]:
    batches, drafts, contexts = ([2], [0, 3], [64]) if dry else ([1, 4, 16, 64], [0, 3, 5, 7], [1024, 8192])
    for context in contexts:
        for batch in batches:
            for k in drafts:
                yield Cell(batch, k, context)


@dataclass(slots=True)
class Tables:
    """What was found: a round's times by cell and contender, and lines of jobs by batch."""

    rounds: dict[Cell, dict[str, Timing]] = field(default_factory=dict)
    jobs: dict[int, list[list[str]]] = field(default_factory=dict)

    def show(self, bandwidth: float, reached: Reached) -> None:
        """Prints them, beside the time in which a round's bytes can be read at `bandwidth`, bytes a second."""
        for batch, lines in self.jobs.items():
            header = ["cell", "tokens/s", "mean acceptance length", "same output as without drafts"]
            print(f"\nwhole jobs, batch {batch}\n\n{table(header, lines)}")
        lines = []
        for cell, timings in self.rounds.items():
            line = [str(cell.context), str(cell.batch), str(cell.drafts)]
            for name in CONTENDERS:
                timing = timings.get(name)
                if timing is None:
                    line += ["-"] * 4  # no room, or no time
                    continue
                host = f"{timing.host * 1e6:.0f}" if timing.host else "-"
                line += [f"{timing.seconds * 1e3:.2f}", f"{timing.nbytes / bandwidth * 1e3:.2f}", f"{timing.idle:.0%}", host]
            both = [timings[name].seconds for name in CONTENDERS if name in timings]
            lines.append([*line, f"{both[1] / both[0]:.2f}x" if len(both) == 2 else "-"])
            if (cell.context, cell.drafts) == (1024, 5):
                self._judge(cell.batch, timings, reached)
        columns = [f"{name} {what}" for name in CONTENDERS for what in ("ms", "floor ms", "idle", "host us")]
        print(f"\nrounds\n\n{table(['context', 'batch', 'k', *columns, '16-bit / int4'], lines)}\n", flush=True)

    def _judge(self, batch: int, timings: dict[str, Timing], reached: Reached) -> None:
        if "int4" not in timings:
            return
        ours = timings["int4"]
        reached.add("idle", ours.idle)
        if batch == 1:
            reached.add("round", ours.seconds * 1e3)
        if batch in (1, 16) and "16-bit" in timings:
            reached.add(f"batch {batch}", timings["16-bit"].seconds / ours.seconds)


def fill(tables: Tables, name: str, model: Model, settings: dict[str, Any], dry: bool, until: float) -> None:
    """Jobs and rounds of one contender. until: `time.monotonic()` after which no other round is begun."""
    try:
        from bench.inprocess import demo_requests, two_cells

        for batch in [2] if dry else [1, 16]:
            requests = demo_requests(Path(settings["target"]), PROMPTS, 2 * batch, 16 if dry else 256)
            tables.jobs[batch] = two_cells(name, model, settings, requests, batch) + tables.jobs.get(batch, [])
            print(f"{name}, jobs of batch {batch} are done", flush=True)
    except ModuleNotFoundError as error:
        print(f"{name}, whole jobs left out: {error.name} isn't installed", flush=True)
    for cell in cells(dry):
        if time.monotonic() > until:
            print(f"{name}: {cell} and what follows left out, its time is over")
            break
        try:
            took = tables.rounds.setdefault(cell, {})[name] = measure(model, cell)
            print(f"{name}, {cell}: {took.seconds * 1e3:.2f} ms", flush=True)
        except torch.OutOfMemoryError:
            print(f"{name}: no room for {cell}")
            torch.cuda.empty_cache()


def report(shape: str, device: torch.device, bandwidth: float, dry: bool, until: float, reached: Reached) -> None:
    """Makes the model and prints all tables. until: `time.monotonic()` after which no other round is begun."""
    tables = Tables()
    with tempfile.TemporaryDirectory() as scratch:
        directory = SOURCE
        if not dry:
            directory = Path(scratch) / "model"
            start = time.monotonic()
            enlarge(SOURCE, directory, SHAPES[shape])
            print(f"a model of {shape}'s shape, made in {time.monotonic() - start:.0f} seconds", flush=True)
        for number, (name, quantization) in enumerate(CONTENDERS.items()):
            share = time.monotonic() + (until - time.monotonic()) / (len(CONTENDERS) - number)
            settings = {"target": str(directory), "quantization": quantization, "group_size": 32 if dry else 128}
            start = time.monotonic()
            model = load_model(ModelConfig.model_validate(settings), Solo(), device)
            print(f"{name}: loaded in {time.monotonic() - start:.0f} seconds", flush=True)
            fill(tables, name, model, settings, dry, share)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    tables.show(bandwidth, reached)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the demo's model, on a CPU")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--bandwidth", type=float, default=4.0e12, help="bytes a second that the device reads, for the floor")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    reached = Reached()
    report(options.shape, device, options.bandwidth, options.dry_run, time.monotonic() + 480, reached)
    print(reached.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
