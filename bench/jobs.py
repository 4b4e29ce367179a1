"""Whole jobs for benchmarks: files in, files out, under a launcher, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.results import stable

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus"],
    "torchrun": ["torchrun", "--nproc_per_node"],
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job's summary, and its rows by custom_id without what depends on time."""

    summary: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @property
    def texts(self) -> dict[str, str]:
        """The text of every request that was completed."""
        choices = {key: row["response"]["body"]["choices"][0] for key, row in self.rows.items() if row["response"]}
        return {key: c["text"] if "text" in c else c["message"]["content"] for key, c in choices.items()}


def run_job(
    output: Path, ranks: int, settings: Mapping[str, Any], *options: str, launcher: str = "torchrun", quiet: bool = True
) -> Outcome:
    """Runs one job from the beginning, `settings` as --set and `options` as they are. Exits with its code if it fails."""
    output.mkdir(parents=True, exist_ok=True)
    results, summary = output / "results.jsonl", output / "summary.json"
    for left in (results, results.with_name("results.jsonl.job"), summary):
        left.unlink(missing_ok=True)
    command = [*LAUNCHERS[launcher], str(ranks), "launcher/main.py", *options]
    command += ["--output", str(results), "--summary", str(summary)]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if not quiet:
        print("$", *command, flush=True)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=quiet, text=True, env=environment)
    if done.returncode != 0 or not summary.exists():
        print(*command, done.stdout or "", done.stderr or "", sep="\n", file=sys.stderr)
        sys.exit(done.returncode or 1)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return Outcome(json.loads(summary.read_text()), {row["custom_id"]: stable(row) for row in rows})
