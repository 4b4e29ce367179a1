"""`python -m bench.drafts`: numbers of drafts that are chosen, beside every fixed one and none.

Whole jobs on one rank, all settings of a cell one after the other and that `--repeats` times, medians: batches, drafters,
ordinary prompts (the demo's) and repetitive ones (a piece of each, three times over). `--model` takes another checkpoint
with the demo's tokenizer, such as one that `bench.enlarge` made.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.jobs import run_job
from bench.prompts import demo_texts, write_requests
from bench.tables import table

CONFIG = "configs/demo/demo.yaml"
PIECE = 240  # characters that a repetitive prompt repeats


def cell(model: Path | None, batch: int, method: str, prompts: Path, drafts: list[str], repeats: int) -> dict[str, float]:
    """Median tokens/s of no drafter ("none"), of every fixed number, and of "auto"."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = None
        for _ in range(repeats):
            for name in ("none", *drafts, "auto"):
                settings: dict[str, Any] = {"parallel.tensor": 1, "engine.max_num_seqs": batch}
                settings |= {"speculation.method": "none"} if name == "none" else {
                    "speculation.method": method, "speculation.num_speculative_tokens": name,
                }  # fmt: skip
                settings |= {} if model is None else {"model.target": model}
                job = run_job(Path(scratch), 1, settings, "--config", CONFIG, "--input", str(prompts))
                rows = rows or job.rows
                assert job.rows == rows, "numbers of drafts changed the output"
                found.setdefault(name, []).append(job.summary["tokens_per_second"])
    return {name: statistics.median(values) for name, values in found.items()}


def rows(given: argparse.Namespace) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        for kind in given.prompts:
            prompts = Path(scratch) / f"{kind}.jsonl"
            texts = demo_texts()[: given.count]
            if kind == "repetitive":
                texts = [3 * (text[:PIECE].rstrip("\n") + "\n") for text in texts]
            write_requests(prompts, [(kind, text) for text in texts], given.new_tokens, 0.0)
            for method in given.methods:
                for batch in given.batches:
                    speeds = cell(given.model, batch, method, prompts, given.drafts, given.repeats)
                    best = max(speed for name, speed in speeds.items() if name != "auto")
                    shown = [f"{speeds[name] / speeds['none']:.2f}" for name in (*given.drafts, "auto")]
                    yield [kind, method, str(batch), *shown, f"{speeds['auto'] / best:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", default=["ngram", "suffix", "model", "auto"])
    parser.add_argument("--prompts", nargs="+", choices=["ordinary", "repetitive"], default=["ordinary", "repetitive"])
    parser.add_argument("--drafts", nargs="+", default=["1", "3", "5", "8", "16"])
    parser.add_argument("--count", type=int, default=16, help="requests")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print("Tokens/s, to no drafter; last: the chosen numbers, to the best of all others.\n")
    header = ["prompts", "drafter", "batch", *given.drafts, "auto", "auto to the best"]
    print(table(header, rows(given)))


if __name__ == "__main__":
    main()
