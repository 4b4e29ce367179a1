"""`python -m bench.acceptance`: how many drafts stand, by drafter and by k, on the demo's held-out prompts."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.jobs import run_job

CONFIG = "configs/demo/demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 5, 7])
    given = parser.parse_args()
    print("| drafter | k | mean acceptance length | share of drafts that stood | tokens/s, to no drafter |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        plain = run_job(Path(scratch) / "none", 1, {"parallel.tensor": 1, "speculation.method": "none"}, "--config", CONFIG)
        for method in ("ngram", "suffix", "model"):
            for drafts in given.drafts:
                settings = {
                    "parallel.tensor": 1, "speculation.method": method, "speculation.num_speculative_tokens": drafts,
                }  # fmt: skip
                job = run_job(Path(scratch) / f"{method}{drafts}", 1, settings, "--config", CONFIG)
                assert job.rows == plain.rows, "speculation changed the output"
                ratio = job.summary["tokens_per_second"] / plain.summary["tokens_per_second"]
                length, rate = job.summary["mean_acceptance_length"], job.summary["draft_acceptance_rate"]
                print(f"| {method} | {drafts} | {length:.2f} | {rate:.0%} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
