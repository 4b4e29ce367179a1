"""The GPU's kernels beside what torch has, and gemlite where it is installed; a part of `python -m bench.gpu`.

At the layer shapes of Qwen3-8B and Qwen3-32B. Calls are replayed from a CUDA graph, so that no launch from Python is in a time,
and go through so many copies of their weight that none is still in the card's cache.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.goals import Reached
from bench.tables import table
from runtime.kernels import gpu, reference
from runtime.kernels.packed import PackedInt4
from runtime.quantize.int4 import Int4Weight
from runtime.quantize.int8 import Int8Weight

GROUP = 128
COLD = 1 << 28  # bytes of copies a contender goes through: several times the largest cache of a card
SHAPES = {  # [outputs, inputs]; q, k and v are one product, and so are gate and up
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate+up": (24576, 4096), "8B down": (4096, 12288),
    "32B qkv": (10240, 5120), "32B o": (5120, 8192), "32B gate+up": (51200, 5120), "32B down": (5120, 25600),
}  # fmt: skip
RIVALS = ["torch bf16", "torch int4", "gemlite"]
Run = Callable[[int], object]


def microseconds(run: Run, calls: int, dry: bool = False) -> float:
    """The median of seven replays of a graph of `calls` calls, for one call; dry: one call by the clock."""
    if dry:
        start = time.perf_counter()
        run(0)
        return (time.perf_counter() - start) * 1e6
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(3):
            run(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            run(turn)
    times = []
    for _ in range(8):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / calls)
    return statistics.median(times[1:])


def ceilings(device: torch.device, dry: bool) -> tuple[float, float]:
    """GB/s of a copy (read and written) and TFLOP/s of a dense bfloat16 product."""
    size = 1 << 16 if dry else 1 << 30
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / microseconds(lambda _: target.copy_(source), 5, dry) / 1e3
    side = 64 if dry else 8192
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    out = torch.empty_like(a)
    return copied, 2 * side**3 / microseconds(lambda _: torch.mm(a, b, out=out), 5, dry) / 1e6


def weight_of(outputs: int, inputs: int, device: torch.device) -> Int4Weight:
    """Random codes: time doesn't depend on them, and quantising the largest shapes would take longer than all else."""
    codes = torch.randint(0, 16, (outputs, inputs), device=device, dtype=torch.uint8)
    scale = (torch.rand(outputs, inputs // GROUP, device=device) / 100).bfloat16().float()
    return Int4Weight(codes, scale, torch.full_like(scale, 8, dtype=torch.uint8), GROUP)


def products(weight: Int4Weight, gates: bool, dry: bool) -> dict[str, tuple[Callable[[Tensor, int], Tensor], int, int] | str]:
    """name -> (product of x and a turn, bytes it reads, its copies), or why there is none; gates: one that ends in them."""
    result: dict[str, tuple[Callable[[Tensor, int], Tensor], int, int] | str] = {}

    def add(name: str, make: Callable[[], tuple[Any, int, Callable[[Tensor, Any], Tensor]]]) -> None:
        try:
            first, size, product = make()
            count = 1 if dry else max(2, -(-COLD // size))
            copies = [first, *(make()[0] for _ in range(count - 1))]
            result[name] = (lambda x, turn: product(x, copies[turn % count])), size, count
        except Exception as error:  # a rival that can't run here is a line in the table, not the end of it
            result[name] = _short(error)

    def ours() -> tuple[PackedInt4, int, Callable[[Tensor, PackedInt4], Tensor]]:
        packed = gpu.pack_int4(weight, "16bit")
        return packed, packed.nbytes, gpu.int4_linear

    def gated() -> tuple[PackedInt4, int, Callable[[Tensor, PackedInt4], Tensor]]:
        packed = gpu.pack_int4(weight, "16bit")
        return packed, packed.nbytes, lambda x, made: gpu.int4_linear(x, made, "silu")

    def dense() -> tuple[Tensor, int, Callable[[Tensor, Tensor], Tensor]]:
        wide = weight.dequantize().bfloat16()
        return wide, wide.nbytes, torch.nn.functional.linear

    def torchs() -> tuple[tuple[Tensor, Tensor], int, Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]]:
        pairs = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        scales = torch.stack([weight.scale.t(), torch.zeros_like(weight.scale.t())], -1).bfloat16().contiguous()
        product = torch.ops.aten._weight_int4pack_mm
        return (packed, scales), packed.nbytes + scales.nbytes, lambda x, p: product(x, p[0], GROUP, p[1])

    def gemlite() -> tuple[Any, int, Callable[[Tensor, Any], Tensor]]:
        from gemlite.core import DType, GemLiteLinear

        outputs, inputs = weight.codes.shape
        layer = GemLiteLinear(4, GROUP, inputs, outputs, input_dtype=DType.BF16, output_dtype=DType.BF16)
        scale = weight.scale.bfloat16()
        layer.pack(weight.codes, scale, torch.full_like(scale, 8), None)
        return layer, weight.codes.numel() // 2 + scale.nbytes, lambda x, made: made.forward(x)

    add("ours", ours)
    if gates:
        add("ours + gates", gated)
    add("torch bf16", dense)
    add("torch int4", torchs)
    add("gemlite", gemlite)
    return result


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def attention(sequences: int, rows: int, context: int, device: torch.device, dry: bool) -> dict[str, tuple[float, int]]:
    """name -> (microseconds, bytes of keys and values): `rows` rows of each sequence, 32 heads over 8, 128 wide."""
    heads, kv, dim, block = (4, 2, 16, 16) if dry else (32, 8, 128, 16)
    blocks = context // block
    layers = 1 if dry else 4
    cache = torch.randn(layers, 2, sequences * blocks, kv, block, dim, device=device).bfloat16()
    tables = torch.randperm(sequences * blocks, device=device).view(sequences, blocks).int()
    which = torch.arange(sequences, device=device).repeat_interleave(rows).int()
    positions = torch.arange(context - rows, context, device=device).repeat(sequences).int()
    query = torch.randn(sequences * rows, heads, dim, device=device).bfloat16()
    whole = cache.view(layers, 2, sequences, kv, context, dim)
    mask = torch.arange(context, device=device)[None] <= positions[:rows, None]
    split = query.view(sequences, rows, heads, dim).transpose(1, 2)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ours(turn: int) -> Tensor:
        keys, values = cache[turn % layers]
        return gpu.paged_attention(query, keys, values, tables, which, positions, dim**-0.5)

    bytes_ = torch.randint(-128, 128, (*cache.shape[:-1], dim + 4), device=device, dtype=torch.int8)
    bytes_.view(torch.float32)[..., -1] = 0.01

    def eight(turn: int) -> Tensor:
        keys, values = bytes_[turn % layers]
        return gpu.paged_attention(query, keys, values, tables, which, positions, dim**-0.5)

    def torchs(turn: int) -> Tensor:
        keys, values = whole[turn % layers]
        return sdpa(split, keys, values, attn_mask=mask, enable_gqa=True)

    size = cache[0].nbytes
    return {
        "ours, paged": (microseconds(ours, 2 * layers, dry), size),
        "ours, paged, int8 cache": (microseconds(eight, 2 * layers, dry), bytes_[0].nbytes),
        "torch, contiguous": (microseconds(torchs, 2 * layers, dry), size),
    }


def head(rows: int, device: torch.device, dry: bool) -> dict[str, tuple[float, int]]:
    """name -> (microseconds, bytes of the weight): an 8B model's head, from hidden states to tokens."""
    vocab, width = (300, 64) if dry else (151936, 4096)
    x, weight = torch.randn(rows, width, device=device).bfloat16(), torch.randn(vocab, width, device=device).bfloat16()
    codes = torch.randint(-127, 128, (vocab, width), dtype=torch.int8, device=device)
    eight = gpu.pack_int8(Int8Weight(codes, torch.rand(vocab, device=device)))
    rest = torch.ones(rows, device=device), torch.arange(rows, device=device), torch.arange(rows, device=device), 0
    runs: dict[str, tuple[Run, int]] = {
        "ours, 16 bit": (lambda _: gpu.head_best(x, weight, *rest), weight.nbytes),
        "ours, 16 bit, by way of logits": (lambda _: gpu.best_tokens(gpu.dense_linear(x, weight), *rest), weight.nbytes),
        "ours, 8 bit": (lambda _: gpu.head_best(x, eight, *rest), eight.nbytes),
        "torch, 16 bit, greedy": (lambda _: torch.nn.functional.linear(x, weight).argmax(1), weight.nbytes),
    }
    return {name: (microseconds(run, 4, dry), size) for name, (run, size) in runs.items()}


def between(rows: int, device: torch.device, dry: bool) -> dict[str, float]:
    """name -> microseconds of what an 8B model's layer does between its products."""
    heads, kv, dim, width, inner = (4, 2, 16, 64, 96) if dry else (32, 8, 128, 4096, 12288)
    x, weight = torch.randn(rows, width, device=device).bfloat16(), torch.rand(width, device=device)
    qkv = torch.randn(rows, (heads + 2 * kv) * dim, device=device).bfloat16()
    angle, norm, slots = qkv[:, :dim], torch.rand(dim, device=device), torch.arange(rows, device=device)
    keys, values = torch.zeros(2, 8, kv, 16, dim, device=device).bfloat16()
    eights = torch.zeros(2, 8, kv, 16, dim + 4, device=device, dtype=torch.int8)
    both = torch.randn(rows, 2 * inner, device=device).bfloat16()
    runs: dict[str, Run] = {
        "residual and norm": lambda _: gpu.rms_norm(x, weight, 1e-6, True, x),
        "head norms, rotary, cache": lambda _: gpu.rotary_write(
            qkv, angle, angle, norm, norm, 1e-6, True, keys, values, slots
        ),
        "the same, int8 cache": lambda _: gpu.rotary_write(
            qkv, angle, angle, norm, norm, 1e-6, True, eights[0], eights[1], slots
        ),
        "gates": lambda _: gpu.gated(both, "silu"),
    }
    return {name: microseconds(run, 20, dry) for name, run in runs.items()}


def check(device: torch.device, dry: bool) -> float:
    """The largest difference of our product from the reference's, relative to the largest result."""
    weight = weight_of(64, 256, device) if dry else weight_of(1024, 4096, device)
    x = torch.randn(5, weight.codes.shape[1], device=device).bfloat16()
    expected = reference.int4_linear(x.float(), reference.pack_int4(weight, "16bit"))
    return float((gpu.int4_linear(x, gpu.pack_int4(weight, "16bit")) - expected).abs().max() / expected.abs().max())


def every_product(
    device: torch.device, copied: float, dry: bool, all_rows: Sequence[int], until: float, reached: Reached
) -> None:
    """Prints a table of each shape as it is done. until: `time.monotonic()` after which no other is begun."""
    shapes = {"tiny": (96, 256)} if dry else SHAPES
    for name, (outputs, inputs) in shapes.items():
        if time.monotonic() > until:
            print(f"{name}: left out, the time is over")
            continue
        runs = products(weight_of(outputs, inputs, device), dry or "gate" in name, dry)
        lines = []
        for rows in all_rows[: 2 if dry else None]:
            x = torch.randn(rows, inputs, device=device).bfloat16()
            line, times = [str(rows)], {}
            for contender, made in runs.items():
                if isinstance(made, str):
                    line.append("-")
                    continue
                product, size, copies = made
                try:
                    times[contender] = microseconds(functools.partial(product, x), 2 * copies, dry)
                except RuntimeError as error:
                    runs[contender] = _short(error)
                    line.append("-")
                    continue
                rate = size / times[contender] / 1e3
                line.append(f"{times[contender]:.1f} us, {rate:.0f} GB/s, {rate / copied:.0%}")
                if contender == "ours" and name.startswith("8B") and rows <= 16:
                    reached.add("bandwidth", rate / copied)
            if name.startswith("8B") and rows <= 64 and {"ours", "torch bf16"} <= times.keys():
                reached.add("few" if rows <= 16 else "32" if rows <= 32 else "64", times["torch bf16"] / times["ours"])
            lines.append(line + [f"{times[c] / times['ours']:.2f}x" if {c, "ours"} <= times.keys() else "-" for c in RIVALS])
        print(f"{name}: {outputs} x {inputs}, groups of {GROUP}\n")
        print(table(["rows", *runs, *(f"{c} / ours" for c in RIVALS)], lines))
        print("".join(f"{c}: {made}\n" for c, made in runs.items() if isinstance(made, str)), flush=True)
        if isinstance(runs["ours"], str):
            raise RuntimeError(f"our product can't run: {runs['ours']}")
        del runs


def other_kernels(device: torch.device, copied: float, dry: bool, reached: Reached) -> None:
    """Prints what attention, the head and all between products take."""
    for sequences, rows, context in [(2, 2, 64)] if dry else [(1, 1, 4096), (1, 6, 8192), (16, 6, 4096), (64, 1, 2048)]:
        for who, (us, size) in attention(sequences, rows, context, device, dry).items():
            rate = size / us / 1e3
            what = f"attention, {sequences} x {rows} rows over {context}"
            print(f"{what}: {who} {us:.1f} us, {rate:.0f} GB/s, {rate / copied:.0%}")
            if (sequences, rows, context, who) == (16, 6, 4096, "ours, paged"):
                reached.add("attention", rate / copied)
    for rows in [2] if dry else [1, 6, 16, 64]:
        for who, (us, size) in head(rows, device, dry).items():
            print(f"head, {rows} rows: {who} {us:.1f} us, {size / us / 1e3:.0f} GB/s, {size / us / 1e3 / copied:.0%}")
        for what, us in between(rows, device, dry).items():
            print(f"{what}, {rows} rows: {us:.1f} us")
