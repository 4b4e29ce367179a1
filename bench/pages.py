"""`python -m bench.pages`: what huge pages bring, on a layer's int4 weights of Qwen3-0.6B's shape, 28 times in memory.

Products with one row and with six, of weights that lie where the allocator puts them and in huge pages; medians of interleaved
turns.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time

import torch
from torch import Tensor

from bench.tables import table
from runtime import kernels
from runtime.kernels.packed import PackedInt4
from runtime.pages import Pages
from runtime.quantize import int4

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))
LAYERS = 28


def main() -> None:
    module = kernels.select(torch.device("cpu"))
    packed = [module.pack_int4(int4.quantize(torch.randn(n, k) / k**0.5, 128, symmetric=True), "int8") for n, k in SHAPES]
    pages = Pages()

    def copies(place: str) -> list[PackedInt4]:
        def copy(x: Tensor) -> Tensor:
            return x.clone() if place == "small" else pages.empty(x.shape, x.dtype).copy_(x)

        return [dataclasses.replace(weight, codes=copy(weight.codes)) for _ in range(LAYERS) for weight in packed]

    places = {place: copies(place) for place in ("small", "huge")}
    rows = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        for count in (1, 6):
            inputs = {k: torch.randn(count, k).bfloat16() for _, k in SHAPES}
            times: dict[str, list[float]] = {place: [] for place in places}
            for _ in range(20):
                for place, weights in places.items():
                    start = time.perf_counter()
                    for weight in weights:
                        module.int4_linear(inputs[weight.in_features], weight)
                    times[place].append(1e3 * (time.perf_counter() - start))
            small, huge = (statistics.median(times[place][2:]) for place in ("small", "huge"))
            rows.append([str(threads), str(count), f"{small:.2f}", f"{huge:.2f}", f"{small / huge:.2f}"])
    print(table(["threads", "rows", "pages of 4 KiB, ms", "of 2 MiB, ms", "ratio"], rows))


if __name__ == "__main__":
    main()
