"""Times the int4 and int8 products and paged attention beside what torch has, in one interleaved run.

    python -m bench.kernels --threads 1 --rows 1 2 4 8 16 64

A product's time means little without what it must read: every contender cycles through so many copies of its weight
(`--cold` bytes in all, in huge pages as a model's) that none is still in a cache when its turn comes again. Where a virtual
machine shows a whole socket's L3, of which neighbours use an unknown part, that is the honest case. Medians of turns.
"""

import argparse
import dataclasses
import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.machine import read_bandwidth
from bench.tables import table
from runtime import kernels
from runtime.pages import Pages
from runtime.quantize import int4, int8

Run = Callable[[Tensor, int], object]  # (x, turn)


def interleaved(runs: dict[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Milliseconds, the median of `repeats` turns in which everybody runs once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(turn)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def contenders(outputs: int, inputs: int, group: int, cold: int) -> dict[str, tuple[Run, int]]:
    """name -> (product, bytes of its weight), for the CPU. A GPU's would stand beside it with the same names."""
    module = kernels.select(torch.device("cpu"))
    w = torch.randn(outputs, inputs) / inputs**0.5
    four = int4.quantize(w, group, symmetric=True)
    eight = int8.quantize(w)
    result: dict[str, tuple[Run, int]] = {}
    pages = Pages()

    def copies(size: int) -> range:
        return range(max(2, -(-cold // size)))

    def copy(x: Tensor) -> Tensor:
        return pages.empty(x.shape, x.dtype).copy_(x)

    dense = [copy(w.bfloat16()) for _ in copies(w.numel() * 2)]
    result["bf16 linear"] = (functools.partial(_turn, torch.nn.functional.linear, dense), dense[0].nbytes)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four.codes.int(), 1)
    scales = torch.stack([four.scale.t(), torch.zeros_like(four.scale.t())], dim=-1).bfloat16().contiguous()
    packed = [(copy(codes), copy(scales)) for _ in copies(codes.nbytes + scales.nbytes)]

    def torch_int4(x: Tensor, pack: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, pack[0], group, pack[1])

    result["torch int4"] = (functools.partial(_turn, torch_int4, packed), codes.nbytes + scales.nbytes)
    for activations in ("int8", "16bit"):
        first = module.pack_int4(four, activations)
        own = [dataclasses.replace(first, codes=copy(first.codes)) for _ in copies(first.nbytes)]
        result[f"int4, {activations}"] = (functools.partial(_turn, module.int4_linear, own), first.nbytes)
    head = module.pack_int8(eight)
    heads = [dataclasses.replace(head, codes=copy(head.codes)) for _ in copies(head.nbytes)]
    result["int8 head"] = (functools.partial(_turn, module.int8_linear, heads), head.nbytes)
    return result


def _turn(product: Callable[[Tensor, Any], Tensor], weights: list[Any], x: Tensor, turn: int) -> Tensor:
    return product(x, weights[turn % len(weights)])


def attention(rows: int, sequences: int, context: int, repeats: int) -> dict[str, float]:
    """Milliseconds for `rows` rows of each sequence: ours over a paged cache, torch's over one that is in one piece."""
    module, heads, kv, dim, block = kernels.select(torch.device("cpu")), 16, 8, 128, 32
    blocks = context // block
    layers = 8  # caches, so that what one turn reads is cold in the next
    cache = torch.randn(layers, 2, sequences * blocks, kv, block, dim).bfloat16()
    tables = torch.randperm(sequences * blocks).view(sequences, blocks).int()
    which = torch.arange(sequences).repeat_interleave(rows).int()
    positions = (torch.arange(context - rows, context)).repeat(sequences).int()
    query = torch.randn(sequences * rows, heads, dim).bfloat16()
    whole = torch.randn(layers, 2, sequences, kv, context, dim).bfloat16()
    mask = torch.arange(context)[None] <= positions[:rows, None]
    split = query.view(sequences, rows, heads, dim).transpose(1, 2)

    def paged(i: int) -> Tensor:
        k, v = cache[i % layers]
        return module.paged_attention(query, k, v, tables, which, positions, dim**-0.5)

    def dense(i: int) -> Tensor:
        k, v = whole[i % layers]
        return torch.nn.functional.scaled_dot_product_attention(split, k, v, attn_mask=mask, enable_gqa=True)

    return interleaved({"ours, paged": paged, "torch, contiguous": dense}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--cold", type=float, default=1.0, help="GiB of copies a contender cycles through")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    about = f"{options.outputs} x {options.inputs}, groups of {options.group}, bfloat16 activations"
    print(f"{platform.machine()}, torch {torch.__version__}; {about}; {options.cold:g} GiB of copies; medians of")
    print(f"{options.repeats} interleaved runs, in ms, and as a multiple of torch's int4 product (more is faster).\n")
    runs = contenders(options.outputs, options.inputs, options.group, int(options.cold * 2**30))
    for threads in sorted(set(options.threads)):
        torch.set_num_threads(threads)
        read = read_bandwidth(threads) / 1e9
        floor = ", ".join(f"{name} {size / read / 1e6:.2f}" for name, (_, size) in runs.items())
        print(f"**{threads} thread{'s' * (threads > 1)}**: reads {read:.1f} GB/s, so at least (ms): {floor}\n")
        lines = []
        for count in options.rows:
            x = torch.randn(count, options.inputs).bfloat16()
            ms = interleaved({name: functools.partial(f, x) for name, (f, _) in runs.items()}, options.repeats)
            base = ms["torch int4"]
            lines.append([str(count), *(f"{t:.2f} ({base / t:.2f}x)" for t in ms.values())])
        print(table(["rows", *runs], lines) + "\n")
        lines = []
        for count in (1, 4, 8):
            ms = attention(count, sequences=8, context=1024, repeats=options.repeats)
            ratio = ms["torch, contiguous"] / ms["ours, paged"]
            lines.append([str(count), *(f"{t:.2f}" for t in ms.values()), f"{ratio:.2f}x"])
        print("Attention, 8 sequences of 1024 keys, 16 query heads over 8 of keys, 128 wide:\n")
        print(table(["rows a sequence", "ours, paged", "torch, contiguous", "ratio"], lines) + "\n")


if __name__ == "__main__":
    main()
