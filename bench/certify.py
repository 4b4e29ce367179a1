"""`python -m bench.certify`: what certified output costs and gives, on the demo's prompts, beside int4 and 16 bit.

Four whole jobs one after the other on this machine. `--model` takes any directory with the demo's tokenizer: what
`bench.enlarge` makes of the demo's model costs what a real one costs and writes the same text. Words after `--set` change
the configuration of all four, such as `verification.certify_window=8`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench.jobs import ROOT, Outcome, run_job

CONFIG = "configs/demo/demo.yaml"
PROMPTS = ROOT / "configs/demo/prompts.jsonl"
CERTIFIED, SPECULATIVE, PLAIN = "int4 with speculation, certified", "16-bit with speculation", "16-bit"


def cells(model: Path | None) -> dict[str, dict[str, str]]:
    """name -> settings; the last is what all are compared with. model: of both, by default the demo's two checkpoints."""
    reference = str(model or ROOT / "configs/demo/target")
    few = {} if model is None else {"model.target": reference}
    wide = {"model.target": reference, "model.quantization": "none"}
    return {
        "int4 with speculation": few,
        CERTIFIED: few | {"verification.certify": "full", "verification.reference": reference},
        SPECULATIVE: wide,
        PLAIN: wide | {"speculation.method": "none"},
    }


def write_prompts(path: Path, count: int | None, new_tokens: int | None) -> None:
    """The first `count` of the demo's requests, with so many tokens to come; None leaves that as it is."""
    requests = [json.loads(line) for line in PROMPTS.read_text().splitlines()][:count]
    for request in requests:
        request["body"] |= {} if new_tokens is None else {"max_tokens": new_tokens}
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))


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
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--count", type=int, help="prompts")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    common = {"parallel.tensor": str(given.ranks)} | dict(word.split("=", 1) for word in given.set)
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        write_prompts(prompts, given.count, given.new_tokens)
        for number, (name, settings) in enumerate(cells(given.model).items()):
            words = ("--config", CONFIG, "--input", str(prompts))
            found[name] = run_job(Path(scratch) / str(number), given.ranks, settings | common, *words)
    print(
        "| | tokens/s | to 16-bit | texts that differ from 16-bit's | mean acceptance length | "
        "int4 tokens that stood | mean window | tokens a check |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, cell in found.items():
        print(line(name, cell, found[PLAIN]))
    for name in (CERTIFIED, SPECULATIVE):
        assert found[name].texts == found[PLAIN].texts, f"{name}: other text than 16-bit's"


if __name__ == "__main__":
    main()
