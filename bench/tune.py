"""Finds a device's tuned parameters and writes them as `runtime/kernels/tuned/<device>.json`.

    python -m bench.tune                # some minutes, on the device to be tuned
    python -m bench.tune --dry-run      # a tiny shape in Triton's interpreter, on any machine; nothing is written

For each tile of rows every combination of a product's parameters, with weights of four bits and of sixteen, is timed at
layer shapes of Qwen3-8B and Qwen3-32B; the least geometric mean of times wins. Attention has warps and stages of its own.
What else there is reads and writes a row and has nothing to tune. A table changes no bit of any result, which is checked.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import Tensor

from bench.gpu_kernels import COLD, SHAPES, Run, microseconds, weight_of
from runtime.kernels import gpu
from runtime.kernels.gpu import dense
from runtime.kernels.gpu.attention import attend
from runtime.kernels.gpu.linear import multiply
from runtime.kernels.gpu.table import FOLDER, Launch, Table, Tile, parse, slug
from runtime.kernels.packed import PackedInt4

TILES = ("product", "dense", "attention")
OUTPUTS, WARPS, STAGES = (64, 128), (4, 8), (2, 3, 4)
PROGRAMS = (1.0, 2.0, 4.0)  # for each of the device's processors


TINY = {"tiny": (96, 256)}
Weights = Sequence[list[PackedInt4]] | Sequence[list[Tensor]]  # of each shape, copies


def time_of(table: Table, rows: int, weights: Weights, dry: bool = False) -> float:
    """Geometric mean over the weights, in microseconds; infinity for what the device can't hold."""
    logs = []
    for copies in weights:
        first = copies[0]
        held, inputs = (first, first.shape[1]) if isinstance(first, Tensor) else (first.codes, first.in_features)
        x = torch.randn(rows, inputs, device=held.device).bfloat16()
        logs.append(math.log(_time(functools.partial(_turn, x, copies, table), 2 * len(copies), dry)))
    return math.exp(sum(logs) / len(logs))


def _time(run: Run, calls: int, dry: bool) -> float:
    """`microseconds`; infinity for what the device can't hold."""
    try:
        return microseconds(run, calls, dry)
    except (RuntimeError, ValueError) as error:
        print(f"  {error!r}"[:100])
    except Exception as error:  # Triton's own for too much shared memory, which has no public name
        if type(error).__name__ != "OutOfResources":
            raise
    return math.inf


def _turn(x: Tensor, copies: Sequence[PackedInt4 | Tensor], table: Table, turn: int) -> Tensor:
    weight = copies[turn % len(copies)]
    if isinstance(weight, Tensor):
        return dense.multiply(x, weight, None, None, x.dtype, table)
    return multiply(x, weight, None, table)


def tune_product(table: Table, name: str, weights: Weights, dry: bool) -> Table:
    """The best tiles of `Table.product` or `Table.dense`."""
    tiles: dict[int, Tile] = {}
    for rows in (16,) if dry else (16, 32, 64, 128):
        times: dict[Tile, float] = {}
        for outputs, warps, stages in itertools.product(OUTPUTS, WARPS, STAGES):
            tile = Tile(outputs, warps, stages)
            tried: dict[str, Any] = {name: {16: getattr(table, name)[16], rows: tile}}
            times[tile] = time_of(dataclasses.replace(table, **tried), rows, weights, dry)
        tiles[rows] = min(times, key=lambda tile: times[tile])
        print(f"{name}, {rows} rows: {tiles[rows]}, {times[tiles[rows]]:.1f} us", flush=True)
    found: dict[str, Any] = {name: tiles}
    return dataclasses.replace(table, **found)


def tune_attention(table: Table, device: torch.device, dry: bool) -> Table:
    """Warps and stages of both tiles: for 16 sequences of 2048 keys with one row each, and with six."""
    (count, context), (heads, kv, dim) = ((2, 32), (8, 2, 16)) if dry else ((16, 2048), (32, 8, 128))
    cache = torch.randn(2, count * context // 16, kv, 16, dim, device=device).bfloat16()
    tables = torch.randperm(cache.shape[1], device=device).view(count, context // 16).int()
    found = {}
    for tile, height in ((16, 1), (32, 6)):
        which = torch.arange(count, device=device).repeat_interleave(height).int()
        positions = torch.arange(context - height, context, device=device).repeat(count).int()
        query = torch.randn(count * height, heads, dim, device=device).bfloat16()
        times = {}
        for launch in itertools.starmap(Launch, itertools.product((2, 4, 8), (1, 2, 3))):
            tried = dataclasses.replace(table, attention={**table.attention, tile: launch})
            run = functools.partial(
                attend, query, cache[0], cache[1], tables, which, positions, dim**-0.5, 0, 0.0, None, tried
            )  # fmt: skip
            times[launch] = _time(lambda _, run=run: run(), 10, dry)  # type: ignore[misc]
        found[tile] = min(times, key=lambda launch: times[launch])
        print(f"attention, {tile} rows: {found[tile]}, {times[found[tile]]:.1f} us", flush=True)
    return dataclasses.replace(table, attention=found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8B qkv", "8B down", "32B o"])
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape in the interpreter, on a CPU")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        print("no CUDA device; --dry-run runs a tiny shape on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    processors = 1 if dry else torch.cuda.get_device_properties(device).multi_processor_count
    table = parse((FOLDER / "default.json").read_text())
    shapes = list(TINY.values()) if dry else [SHAPES[shape] for shape in options.shapes]
    weights = []
    for shape in shapes:
        packed = gpu.pack_int4(weight_of(*shape, device), "16bit")
        count = 1 if dry else max(2, -(-COLD // packed.nbytes))
        weights.append([dataclasses.replace(packed, codes=packed.codes.clone()) for _ in range(count)])
    x = torch.randn(20 if dry else 200, weights[0][0].in_features, device=device).bfloat16()
    expected = multiply(x, weights[0][0], None, table)
    table = tune_product(table, "product", weights, dry)
    wide = [[torch.randn(*shape, device=device).bfloat16() for _ in range(8)] for shape in shapes]
    table = tune_product(table, "dense", wide, dry)
    tries = {round(p * processors): dataclasses.replace(table, programs=round(p * processors)) for p in PROGRAMS}
    programs = min(tries, key=lambda p: time_of(tries[p], 1, weights, dry) * time_of(tries[p], 16 if dry else 64, weights, dry))
    table = tune_attention(tries[programs], device, dry)
    if not torch.equal(multiply(x, weights[0][0], None, table), expected):
        print("the new table changes bits of the product, so it isn't written; please report this", file=sys.stderr)
        return 1
    text = json.dumps(as_json(table), indent=2) + "\n"
    if parse(text) != table:
        raise ValueError(f"this table cannot be read back:\n{text}")
    if dry:
        print(f"dry run, times mean nothing:\n{text}")
        return 0
    path = FOLDER / f"{slug(torch.cuda.get_device_name())}.json"
    path.write_text(text)
    print(f"{path}: {programs} programs")
    return 0


def as_json(table: Table) -> dict[str, object]:
    """What `parse` reads back."""
    return {
        **{name: {str(rows): dataclasses.asdict(tile) for rows, tile in getattr(table, name).items()} for name in TILES},
        "programs": table.programs,
    }


if __name__ == "__main__":
    raise SystemExit(main())
