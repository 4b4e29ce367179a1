"""`python -m bench.demo`: the demo. The main job, then the same prompts in the other three cells, and a table.

The four cells are 16-bit and int4, each without and with speculation; every cell is a whole job under the same launcher
with the same ranks, one after the other on this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.jobs import ROOT, Outcome, run_job

CONFIG = "configs/demo/demo.yaml"
PLAIN = {"speculation.method": "none"}
WIDE = {"model.target": "configs/demo/target", "model.quantization": "none"}  # what the int4 checkpoint was made of
CELLS: dict[str, dict[str, str]] = {  # name -> what it changes in the configuration; the first is the configuration itself
    "int4 + speculation": {},
    "int4": PLAIN,
    "16-bit + speculation": WIDE,
    "16-bit": WIDE | PLAIN,
}


def table(cells: dict[str, Outcome]) -> Table:
    """The four cells; "same output" compares a cell with its twin without speculation, row by row."""
    shown = Table(title="the four cells")
    for name in ("", "tokens/s", "mean acceptance length", "same output as without speculation"):
        shown.add_column(name, justify="left" if not name else "right")
    for name in reversed(CELLS):
        cell = cells[name]
        plain = cells[name.removesuffix(" + speculation")]
        same = sum(cell.rows[key] == plain.rows[key] for key in plain.rows)
        verdict = "-" if cell is plain else f"{same} of {len(plain.rows)}"
        shown.add_row(
            name, f"{cell.summary['tokens_per_second']:.0f}", f"{cell.summary['mean_acceptance_length']:.2f}", verdict
        )
    return shown


def completions(cell: Outcome, count: int) -> list[tuple[str, str]]:
    """(prompt, text) of the first greedy completions that ran to a good length."""
    prompts = {}
    for line in (ROOT / CONFIG).parent.joinpath("prompts.jsonl").read_text().splitlines():
        request = json.loads(line)
        if "prompt" in request["body"] and request["body"].get("temperature") == 0:
            prompts[request["custom_id"]] = request["body"]["prompt"]
    pairs = [(prompts[key], cell.texts[key]) for key in sorted(prompts)]
    return [pair for pair in pairs if len(pair[1]) > 100][:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "demo-out")
    given = parser.parse_args()
    console = Console(width=100, highlight=False)
    shutil.rmtree(given.output, ignore_errors=True)
    cells = {}
    for number, (name, changes) in enumerate(CELLS.items()):
        directory = given.output if number == 0 else given.output / name.replace(" ", "")
        main = number == 0
        cells[name] = run_job(directory, given.ranks, changes, "--config", CONFIG, launcher="deepspeed", quiet=not main)
    for prompt, text in completions(cells["int4 + speculation"], 2):
        console.rule("a prompt, and how it was continued")
        console.print(prompt, style="dim", markup=False, end="")
        console.print(text, style="bold", markup=False)
    console.rule()
    console.print(table(cells))
    console.print(f"results: {given.output / 'results.jsonl'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
