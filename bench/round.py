"""`python -m bench.round`: where a round's time goes, on a model of Qwen3-0.6B's shape.

Whole jobs through launcher, coordinator and ranks, so that nothing is left out: every part is measured by the ranks
themselves, and "rest" is what of the job's wall time no part accounts for. Prompts of random tokens tell what a round
costs, and nothing about acceptance.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.enlarge import SOURCE, enlarge
from bench.jobs import run_job
from bench.prompts import write_requests
from bench.shapes import SHAPES

OVERHEAD = ("draft", "decide", "exchange", "coordinate", "rest")


def measure(model: Path, prompts: Path, ranks: int, merge: str, batch: int, drafts: int) -> dict[str, Any]:
    """The summary of one job."""
    settings = {
        "model.target": model, "engine.max_num_seqs": batch, "engine.max_model_len": 1024, "engine.device": "cpu",
        "speculation.num_speculative_tokens": drafts, "coordination.merge": merge,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        return run_job(Path(scratch), ranks, settings, "--input", str(prompts)).summary


def rows(summary: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(part, milliseconds a round, share of the round)."""
    parts = dict(summary["seconds_by_part"])
    parts["rest"] = summary["seconds"] - sum(parts.values())
    for name in ("forward", *OVERHEAD):
        yield name, 1000 * parts[name] / summary["rounds"], parts[name] / summary["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    print(f"{given.shape}, batch {given.batch}, k {given.drafts}, {os.cpu_count()} cores, {platform.machine()}\n")
    print("| ranks | merge | part | ms a round | share |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model, prompts = Path(scratch) / "model", Path(scratch) / "prompts.jsonl"
        enlarge(SOURCE, model, SHAPES[given.shape])
        ids = [[random.Random(number).randrange(1, 4000) for _ in range(64)] for number in range(given.batch)]
        write_requests(prompts, [("random", tokens) for tokens in ids], given.new_tokens, 0.0)
        for ranks in given.ranks:
            for merge in ("group", "coordinator"):
                summary = measure(model, prompts, ranks, merge, given.batch, given.drafts)
                shares = {name: share for name, _, share in rows(summary)}
                for name, milliseconds, share in rows(summary):
                    print(f"| {ranks} | {merge} | {name} | {milliseconds:.2f} | {share:.1%} |")
                total = 1000 * summary["seconds"] / summary["rounds"]
                overhead = sum(shares[name] for name in OVERHEAD)
                print(f"| {ranks} | {merge} | **outside the model** | {overhead * total:.2f} of {total:.2f} | {overhead:.1%} |")


if __name__ == "__main__":
    main()
