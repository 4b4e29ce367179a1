"""Finds a device's tuned parameters and writes them as `runtime/kernels/tuned/<device>.json`.

    python -m bench.tune                # some minutes, on the device to be tuned

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
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_kernels import SHAPES, microseconds, weight_of
from runtime.kernels import gpu
from runtime.kernels.gpu import dense
from runtime.kernels.gpu.attention import attend
from runtime.kernels.gpu.linear import multiply
from runtime.kernels.gpu.table import FOLDER, Launch, Table, Tile, parse, slug
from runtime.kernels.packed import PackedInt4

TILES = ("product", "dense", "attention")
OUTPUTS, WARPS, STAGES = (64, 128), (4, 8), (2, 3, 4)
PROGRAMS = (1.0, 2.0, 4.0)  # for each of the device's processors


Weights = Sequence[list[PackedInt4]] | Sequence[list[Tensor]]  # of each shape, copies


def time_of(table: Table, rows: int, weights: Weights) -> float:
    """Geometric mean over the weights, in microseconds; infinity for what the device can't hold."""
    logs = []
    for copies in weights:
        first = copies[0]
        inputs = first.shape[1] if isinstance(first, Tensor) else first.in_features
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        try:
            run = functools.partial(_turn, x, copies, table)
            logs.append(math.log(microseconds(run, 2 * len(copies))))
        except (RuntimeError, ValueError) as error:
            print(f"  {error!r}"[:100])
            return math.inf
        except Exception as error:  # Triton's own for too much shared memory, which has no public name
            if type(error).__name__ != "OutOfResources":
                raise
            return math.inf
    return math.exp(sum(logs) / len(logs))


def _turn(x: Tensor, copies: Sequence[PackedInt4 | Tensor], table: Table, turn: int) -> Tensor:
    weight = copies[turn % len(copies)]
    if isinstance(weight, Tensor):
        return dense.multiply(x, weight, None, None, x.dtype, table)
    return multiply(x, weight, None, table)


def tune_product(table: Table, name: str, weights: Weights) -> Table:
    """The best tiles of `Table.product` or `Table.dense`."""
    tiles: dict[int, Tile] = {}
    for rows in (16, 32, 64, 128):
        times: dict[Tile, float] = {}
        for outputs, warps, stages in itertools.product(OUTPUTS, WARPS, STAGES):
            tile = Tile(outputs, warps, stages)
            tried: dict[str, Any] = {name: {16: getattr(table, name)[16], rows: tile}}
            times[tile] = time_of(dataclasses.replace(table, **tried), rows, weights)
        tiles[rows] = min(times, key=lambda tile: times[tile])
        print(f"{name}, {rows} rows: {tiles[rows]}, {times[tiles[rows]]:.1f} us", flush=True)
    found: dict[str, Any] = {name: tiles}
    return dataclasses.replace(table, **found)


def tune_attention(table: Table) -> Table:
    """Warps and stages of both tiles: for 16 sequences of 2048 keys with one row each, and with six."""
    cache = torch.randn(2, 2048, 8, 16, 128, device="cuda").bfloat16()
    tables = torch.randperm(2048, device="cuda").view(16, 128).int()
    found = {}
    for tile, height in ((16, 1), (32, 6)):
        which = torch.arange(16, device="cuda").repeat_interleave(height).int()
        positions = torch.arange(2048 - height, 2048, device="cuda").repeat(16).int()
        query = torch.randn(16 * height, 32, 128, device="cuda").bfloat16()
        times = {}
        for launch in itertools.starmap(Launch, itertools.product((2, 4, 8), (1, 2, 3))):
            tried = dataclasses.replace(table, attention={**table.attention, tile: launch})

            run = functools.partial(
                attend, query, cache[0], cache[1], tables, which, positions, 128**-0.5, 0, 0.0, None, tried
            )  # fmt: skip
            try:
                times[launch] = microseconds(lambda _, run=run: run(), 10)  # type: ignore[misc]
            except Exception as error:
                if type(error).__name__ != "OutOfResources":
                    raise
        found[tile] = min(times, key=lambda launch: times[launch])
        print(f"attention, {tile} rows: {found[tile]}, {times[found[tile]]:.1f} us", flush=True)
    return dataclasses.replace(table, attention=found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8B qkv", "8B down", "32B o"])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    table = parse((FOLDER / "default.json").read_text())
    weights = []
    for shape in options.shapes:
        packed = gpu.pack_int4(weight_of(*SHAPES[shape], device), "16bit")
        count = max(2, -(-(1 << 28) // packed.nbytes))
        weights.append([dataclasses.replace(packed, codes=packed.codes.clone()) for _ in range(count)])
    x = torch.randn(200, weights[0][0].in_features, device=device).bfloat16()
    expected = multiply(x, weights[0][0], None, table)
    table = tune_product(table, "product", weights)
    wide = [[torch.randn(*SHAPES[shape], device=device).bfloat16() for _ in range(8)] for shape in options.shapes]
    table = tune_product(table, "dense", wide)
    tries = {round(p * processors): dataclasses.replace(table, programs=round(p * processors)) for p in PROGRAMS}
    programs = min(tries, key=lambda p: time_of(tries[p], 1, weights) * time_of(tries[p], 64, weights))
    table = tune_attention(tries[programs])
    if not torch.equal(multiply(x, weights[0][0], None, table), expected):
        print("the new table changes bits of the product, so it isn't written; please report this", file=sys.stderr)
        return 1
    path = FOLDER / f"{slug(name)}.json"
    path.write_text(json.dumps(as_json(table), indent=2) + "\n")
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
