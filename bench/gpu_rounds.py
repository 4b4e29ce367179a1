"""Rounds on a device beside the least time in which their bytes can be read; a part of `python -m bench.gpu`.

    python -m bench.gpu_rounds                    # needs CUDA; a model of Qwen3-8B's shape is made first, 16 GB
    python -m bench.gpu_rounds --dry-run          # the demo's model on any machine: does it run at all

Then whole jobs on that model - whose text is the demo model's - in the four cells.

Sequences of random tokens stand at a context that nobody computed: a round costs the same whatever the cache holds. Drafts
are random too, so that every round checks k of them and decides one token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.enlarge import SOURCE, enlarge
from bench.inprocess import four_cells
from bench.jobs import ROOT
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
ROUNDS = 12  # of a lease, of which the first are left out
CONTENDERS = {"int4": "int4", "16-bit": "none"}  # name -> model.quantization


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
        return self.context + (ROUNDS + 4) * (self.drafts + 1)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one round: seconds of wall time, those the device had nothing to do, and the bytes it had to read."""

    seconds: float
    idle: float
    nbytes: int


def measure(model: Model, cell: Cell) -> Timing:
    """The median round of a lease. Raises torch.OutOfMemoryError."""
    rng = random.Random(0)
    blocks = blocks_for(cell.longest, BLOCK)
    cache = KVCache(model.cache_shape, cell.batch * blocks, BLOCK, model.dtype, model.device)
    proposer = RandomDrafts(model.vocab_size) if cell.drafts else None
    graphs = Graphs(capture_on(model.device))
    budget = cell.batch * (cell.drafts + 1)
    resident = Resident(model, cache, Solo(), proposer, graphs, 1, cell.batch, cell.longest, budget)
    sequences = [
        Running(
            index=slot, slot=slot, tokens=[rng.randrange(model.vocab_size) for _ in range(cell.context)],
            num_prompt=cell.context, limit=cell.longest, ends=frozenset(), sampling=Sampling(seed=slot),
            num_computed=cell.context - 1, blocks=list(range(slot * blocks, (slot + 1) * blocks)), allowance=[cell.drafts],
        )
        for slot in range(cell.batch)
    ]  # fmt: skip
    resident.begin(sequences, ROUNDS)
    for _ in range(3):  # compiled, captured, replayed
        resident.launch()
    list(resident.decisions())
    start = time.perf_counter()
    spans = [_timed(resident) for _ in range(ROUNDS - 3)]
    list(resident.decisions())
    wall = (time.perf_counter() - start) / len(spans)
    on_device = statistics.median(span() for span in spans)
    kv = 2 * model.cache_shape.layers * model.cache_shape.kv_heads * model.cache_shape.head_dim * model.dtype.itemsize
    table: torch.Tensor = model.module.get_input_embeddings().weight  # type: ignore[assignment]
    table_bytes = 0 if model.module.config.tie_word_embeddings else table.nbytes
    return Timing(wall, max(0.0, 1 - on_device / wall), model.weight_bytes - table_bytes + cell.batch * cell.context * kv)


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


def rounds(directory: Path, device: torch.device, bandwidth: float, dry: bool, until: float) -> str:
    """The table of all cells: milliseconds of a round in int4 and in 16 bit, and the byte floor of each at `bandwidth`
    (bytes a second). until: `time.monotonic()` after which no other cell is begun; each contender has its share."""
    found: dict[Cell, dict[str, Timing]] = {}
    for number, (name, quantization) in enumerate(CONTENDERS.items()):
        share = time.monotonic() + (until - time.monotonic()) / (len(CONTENDERS) - number)
        config = ModelConfig(target=str(directory), quantization=quantization, group_size=32 if dry else 128)
        model = load_model(config, Solo(), device)
        for cell in cells(dry):
            if time.monotonic() > share:
                print(f"{name}: {cell} and what follows left out, its time is over")
                break
            try:
                took = found.setdefault(cell, {})[name] = measure(model, cell)
                print(f"{name}, {cell}: {took.seconds * 1e3:.2f} ms", flush=True)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    lines = []
    for cell, timings in found.items():
        line = [str(cell.context), str(cell.batch), str(cell.drafts)]
        for name in CONTENDERS:
            timing = timings.get(name)
            if timing is None:
                line += ["-", "-", "-"]  # no room, or no time
                continue
            floor = timing.nbytes / bandwidth
            line += [f"{timing.seconds * 1e3:.2f}", f"{floor * 1e3:.2f}", f"{timing.idle:.0%}"]
        both = [timings[name].seconds for name in CONTENDERS if name in timings]
        lines.append([*line, f"{both[1] / both[0]:.2f}x" if len(both) == 2 else "-"])
    header = ["context", "batch", "k", *(f"{name} {what}" for name in CONTENDERS for what in ("ms", "floor ms", "idle"))]
    return table([*header, "16-bit / int4"], lines)


def report(shape: str, device: torch.device, bandwidth: float, dry: bool, until: float) -> None:
    """Prints both tables. until: `time.monotonic()` after which no other round is begun, nor a whole job a minute later."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = SOURCE
        if not dry:
            directory = Path(scratch) / "model"
            enlarge(SOURCE, directory, SHAPES[shape])
        print(rounds(directory, device, bandwidth, dry, until), "\n", flush=True)
        prompts, group = ROOT / "configs/demo/prompts.jsonl", 32 if dry else 128
        for batch in [2] if dry else [1, 16]:
            if time.monotonic() > until + 60:
                print(f"whole jobs, batch {batch}: left out, the time is over")
                continue
            print(f"whole jobs, batch {batch}\n")
            print(four_cells(directory, prompts, device, batch, 16 if dry else 256, group), "\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the demo's model, on a CPU")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--bandwidth", type=float, default=4.0e12, help="bytes a second that the device reads, for the floor")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    report(options.shape, device, options.bandwidth, options.dry_run, time.monotonic() + 480)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
