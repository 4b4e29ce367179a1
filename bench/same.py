"""`python -m bench.same`: what the same tokens always cost in products, on one thread of a CPU; half a minute.

A 16-bit product that doesn't depend on the other rows beside torch's own, which may; a 4-bit product whose inputs are
summed in eight segments beside one that sums them in a single one. Shapes are those of a square matrix and of
Qwen3-0.6B, of which only o and down are ever summed in segments. Medians of interleaved turns, each over another copy of the
weight than the last. What an exchange of float32 costs beside one of bfloat16 is told by `python -m bench.comm`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
from torch.nn import functional

from bench.kernels import interleaved
from bench.tables import table
from runtime.kernels import select
from runtime.quantize.int4 import quantize

SHAPES = {"4096 x 4096": (4096, 4096), "0.6B qkv": (4096, 1024), "0.6B o": (1024, 2048), "0.6B down": (1024, 3072)}
BEFORE = {"dense": "torch", "dense, segments": "dense", "int4, segments": "int4"}
COPIES = 6


def products(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> dict[str, Callable[[int], object]]:
    """By name, each with the number of its turn."""
    kernels = select(torch.device("cpu"))
    wide = [torch.randn(outputs, inputs) / inputs**0.5 for _ in range(COPIES)]
    dense = [weight.to(dtype) for weight in wide]
    fours = [kernels.pack_int4(quantize(weight, 128, symmetric=True), "int8") for weight in wide]
    x = torch.randn(rows, inputs).to(dtype)
    borders = [inputs // 8 * segment for segment in range(1, 8)]
    return {
        "torch": lambda turn: functional.linear(x, dense[turn % COPIES]),
        "dense": lambda turn: kernels.dense_linear(x, dense[(turn + 2) % COPIES]),
        "dense, segments": lambda turn: kernels.dense_linear(x, dense[(turn + 4) % COPIES], borders),
        "int4": lambda turn: kernels.int4_linear(x, fours[turn % COPIES]),
        "int4, segments": lambda turn: kernels.int4_linear(x, fours[(turn + 3) % COPIES], None, borders),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 6, 24, 128, 512])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{given.dtype}, torch {torch.__version__}, {platform.machine()}; ms, and how much longer than what stands before\n")
    lines = []
    for shape in given.shapes:
        for rows in given.rows:
            found = interleaved(products(*SHAPES[shape], rows, getattr(torch, given.dtype)), given.repeats)
            more = {name: f" ({found[name] / found[before] - 1:+.0%})" for name, before in BEFORE.items()}
            lines.append([shape, str(rows), *(f"{ms:.2f}{more.get(name, '')}" for name, ms in found.items())])
    print(table(["weight", "rows", "torch", "dense", "dense, segments", "int4", "int4, segments"], lines))


if __name__ == "__main__":
    main()
