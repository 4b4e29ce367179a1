"""`python -m bench.certify`: what certified output costs and gives, on the demo's prompts, beside int4 and 16 bit.

Four whole jobs one after the other on this machine. `--model` takes any directory with the demo's tokenizer: what
`bench.enlarge` makes of the demo's model costs what a real one costs and writes the same text. Words after `--set` change
the configuration of all four, such as `verification.certify_window=8`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.jobs import ROOT, Outcome, run_job

CONFIG = "configs/demo/demo.yaml"
REFERENCE = "configs/demo/target"
WIDE = {"model.target": REFERENCE, "model.quantization": "none"}
CELLS: dict[str, dict[str, str]] = {  # the last is what all are compared with
    "int4 with speculation": {},
    "int4 with speculation, certified": {"verification.certify": "full", "verification.reference": REFERENCE},
    "16-bit with speculation": WIDE,
    "16-bit": WIDE | {"speculation.method": "none"},
}


def line(name: str, cell: Outcome, expected: Outcome) -> str:
    different = sum(cell.texts[key] != text for key, text in expected.texts.items())
    stood = "- | - | -"
    if about := cell.summary["certification"]:
        stood = f"{about['share_that_stood']:.0%} | {about['mean_window']:.1f} | {about['tokens_per_check']:.2f}"
        acceptance = about["int4_speculation"]["mean_acceptance_length"]
    else:
        acceptance = cell.summary["mean_acceptance_length"]
    speed, base = cell.summary["tokens_per_second"], expected.summary["tokens_per_second"]
    share = f"{different} of {len(expected.texts)}" if cell is not expected else "-"
    return f"| {name} | {speed:.0f} | {speed / base:.2f} | {share} | {acceptance:.2f} | {stood} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "configs/demo/target")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    common = {"model.target": str(given.model), "parallel.tensor": str(given.ranks)}
    common |= dict(word.split("=", 1) for word in given.set)
    cells: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, settings) in enumerate(CELLS.items()):
            cells[name] = run_job(Path(scratch) / str(number), given.ranks, common | settings, "--config", CONFIG)
    print(
        "| | tokens/s | to 16-bit | texts that differ from 16-bit's | mean acceptance length | "
        "int4 tokens that stood | mean window | tokens a check |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in CELLS:
        print(line(name, cells[name], cells["16-bit"]))
    for key in ("int4 with speculation, certified", "16-bit with speculation"):
        assert cells[key].texts == cells["16-bit"].texts, f"{key}: other text than 16-bit's"


if __name__ == "__main__":
    main()
