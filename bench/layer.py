"""`python -m bench.layer`: what a forward pass costs, beside transformers' own of the same shape, in one run.

A model of Qwen3-0.6B's shape. A pass of N rows checks the last N tokens of one sequence with `--context` tokens in
the cache; transformers' bfloat16 model, which has no paged cache, is given the same with its own cache, cropped after
every pass. Medians of interleaved turns. How fast weights are read stands beside what the machine can read, the most of
several tries in the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench.enlarge import SOURCE, enlarge
from bench.shapes import SHAPES
from configs.schema import ModelConfig
from runtime.batch import Batch, Piece
from runtime.comm import Solo
from runtime.kv_cache import KVCache
from runtime.model import Model, load_model
from runtime.pages import Pages

BLOCK = 16
READ = 1 << 27  # floats, that are read to see how fast the machine reads
THEIRS = "transformers bf16"
Run = tuple[str, int]  # who, and rows
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "none, 16bit head": {"quantization": "none"},
    "none, int8 head": {"quantization": "none", "lm_head": "int8"},
    "int4 + int8, 16bit head": {"activations": "int8", "lm_head": "16bit"},
    "int4 + int8, int8 head": {"activations": "int8", "lm_head": "int8"},
    "int4 + int8, screened head": {"activations": "int8", "lm_head": "screened"},
    "int4 + 16bit, int8 head": {"activations": "16bit", "lm_head": "int8"},
}


def ours(model: Model, context: int, rows: int) -> Callable[[], object]:
    """A pass of `rows` tokens behind `context` cached ones."""
    blocks = list(range(-(-(context + rows) // BLOCK)))
    cache = KVCache(model.cache_shape, len(blocks), BLOCK, model.dtype)
    tokens = [(7 * t) % 4000 for t in range(context + rows)]
    model.forward(Batch.build([Piece(tokens[:context], 0, blocks, 0)], BLOCK), cache)
    return lambda: model.forward(Batch.build([Piece(tokens[context:], context, blocks, rows)], BLOCK), cache)


def theirs(model: PreTrainedModel, context: int, rows: int) -> Callable[[], object]:
    """The same by transformers."""
    tokens = torch.tensor([[(7 * t) % 4000 for t in range(context + rows)]])
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokens[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> object:
        logits = model(tokens[:, context:], past_key_values=cache, use_cache=True).logits
        cache.crop(-rows)
        return logits

    return run


def interleaved(runs: dict[Run, Callable[[], object]], repeats: int) -> dict[Run, float]:
    """Milliseconds, the median of `repeats` turns in which everybody runs twice, and the second time counts."""
    times: dict[Run, list[float]] = {run: [] for run in runs}
    for _ in range(repeats):
        for run, call in runs.items():
            call()
            start = time.perf_counter()
            call()
            times[run].append((time.perf_counter() - start) * 1e3)
    return {run: statistics.median(each) for run, each in times.items()}


class Timed:
    """The extension's operations, alone and as whole layers: where they stand, for a while, with the seconds they take."""

    def __init__(self) -> None:
        from runtime.kernels import cpu, native

        self.seconds = 0.0
        self._places: list[tuple[Any, str, Any]] = [(native, "_run_layers", native._run_layers), (cpu, "_ops", cpu._ops)]

    def _timed(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = operation(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._timed(getattr(self._places[-1][2], name))

    def __enter__(self) -> Timed:
        for module, name, operation in self._places:
            setattr(module, name, self if name == "_ops" else self._timed(operation))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, operation in self._places:
            setattr(module, name, operation)


def outside(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Milliseconds of a pass that are not in the kernels, and of the whole pass: medians."""
    spent = []
    for _ in range(repeats + 1):
        with Timed() as timed:
            start = time.perf_counter()
            run()
            whole = time.perf_counter() - start
        spent.append((1e3 * (whole - timed.seconds), 1e3 * whole))
    return statistics.median(rest for rest, _ in spent[1:]), statistics.median(whole for _, whole in spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 6, 8, 16, 96])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        enlarge(SOURCE, Path(scratch), SHAPES[given.shape])
        baseline = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16).eval()
        models = {
            name: load_model(ModelConfig(target=scratch, **CONFIGURATIONS[name]), Solo(), "cpu") for name in given.only
        }
    print(f"{given.shape}, {given.context} tokens of context, torch {torch.__version__}, {platform.machine()}")
    for threads in given.threads:
        torch.set_num_threads(threads)
        print(f"\n**{threads} thread{'s' * (threads > 1)}**: ms a pass (transformers' over it; it over the first line's)\n")
        names = [THEIRS, *models]
        print("| rows | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
        memory = Pages().empty((READ,), torch.float32).fill_(1.0)
        runs: dict[Run, Callable[[], object]] = {("read", 0): memory.sum}
        for rows in given.rows:
            runs[THEIRS, rows] = theirs(baseline, given.context, rows)
            runs |= {(name, rows): ours(model, given.context, rows) for name, model in models.items()}
        found = interleaved(runs, given.repeats)
        for rows in given.rows:
            cells = [
                f"{found[name, rows]:.1f} ({found[THEIRS, rows] / found[name, rows]:.2f}x, "
                f"{found[name, rows] / found[name, given.rows[0]]:.2f})" for name in names
            ]  # fmt: skip
            print(f"| {rows} | " + " | ".join(cells) + " |")
        read = memory.nbytes / found["read", 0] / 1e6
        print(f"\nThe machine reads {read:.1f} GB/s. With {given.rows[0]} row{'s' * (given.rows[0] > 1)}:\n")
        for name, model in models.items():
            rest, whole = outside(ours(model, given.context, given.rows[0]), 4 * given.repeats)
            rate = model.bytes_read / found[name, given.rows[0]] / 1e6
            print(
                f"- {name}: {model.bytes_read / 1e6:.0f} MB of weights at {rate:.1f} GB/s, {rate / read:.0%}; "
                f"{rest:.1f} of {whole:.1f} ms outside the kernels ({rest / whole:.0%})"
            )


if __name__ == "__main__":
    main()
