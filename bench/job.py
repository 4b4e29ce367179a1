"""`python -m bench.job --model DIR`: whole jobs, in 16 bit and in four, with every drafter and without.

Each measurement is a job as a user runs it: a file of requests, the launcher, a file of results. Jobs take turns, so that what
else the machine does meets all of them; shown are medians and, in brackets, the slowest and the fastest. `--quick` takes
five minutes for the smallest shape; each list on the command line cuts the rest down.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench.jobs import ROOT, Outcome, run_job
from bench.machine import describe, read_bandwidth
from bench.prompts import DEMO, read_prompts, write_requests
from bench.tables import spread, table
from launcher.summary import PARTS

WEIGHTS: dict[str, dict[str, str]] = {
    "16-bit": {"model.quantization": "none"},
    "int4": {"model.quantization": "int4", "model.lm_head": "screened"},
}
DRAFTERS = ("none", "ngram", "suffix", "model")


@dataclass(frozen=True)
class Case:
    """What is told apart."""

    weights: str
    drafter: str
    batch: int
    temperature: float
    ranks: int

    def settings(self, given: argparse.Namespace) -> dict[str, Any]:
        """Of the configuration."""
        return WEIGHTS[self.weights] | {
            "model.target": given.model, "model.group_size": given.group_size, "engine.max_model_len": given.max_model_len,
            "engine.max_num_seqs": self.batch, "speculation.method": self.drafter, "speculation.model": given.draft_model,
            "speculation.num_speculative_tokens": given.drafts,
        }  # fmt: skip


def bytes_read(weights: str, given: argparse.Namespace) -> int:
    """Bytes of weights that a round reads, over all ranks."""
    from configs.schema import ModelConfig
    from runtime.comm import Solo
    from runtime.model import load_model

    changes = {name.removeprefix("model."): value for name, value in WEIGHTS[weights].items()}
    return load_model(ModelConfig(target=str(given.model), group_size=given.group_size, **changes), Solo(), "cpu").bytes_read


def measure(cases: list[Case], given: argparse.Namespace, scratch: Path) -> dict[Case, list[Outcome]]:
    """Every case's outcomes, one of each turn."""
    prompts = read_prompts(given.prompts, given.model, given.count, given.max_model_len - given.new_tokens)
    for temperature in given.temperature:
        write_requests(scratch / f"{temperature}.jsonl", prompts, given.new_tokens, temperature)
    outcomes: dict[Case, list[Outcome]] = {case: [] for case in cases}
    for turn in range(given.repeats):
        for case in cases:
            requests = str(scratch / f"{case.temperature}.jsonl")
            outcome = run_job(scratch / "job", case.ranks, case.settings(given), "--input", requests)
            outcomes[case].append(outcome)
            speed = outcome.summary["tokens_per_second"]
            print(f"turn {turn + 1}: {case}: {speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return outcomes


def report(outcomes: dict[Case, list[Outcome]], read: dict[str, int], bandwidth: float) -> str:
    """The table."""
    head = ["weights", "drafter", "batch", "temperature", "ranks", "tokens/s", "to 16-bit, no drafts", "acceptance length"]
    head += ["same text as no drafts", "MB read a token", "share of bandwidth", "forward, ms a round", "elsewhere, ms a round"]
    rows = []
    for case, found in outcomes.items():
        speeds = [each.summary["tokens_per_second"] for each in found]
        base = outcomes.get(Case("16-bit", "none", case.batch, case.temperature, case.ranks))
        twin = outcomes.get(Case(case.weights, "none", case.batch, case.temperature, case.ranks))
        ratio = statistics.median(speeds) / statistics.median(x.summary["tokens_per_second"] for x in base) if base else None
        last = found[-1]
        same = (
            "-" if twin is None else f"{sum(last.rows[key] == row for key, row in twin[-1].rows.items())} of {len(last.rows)}"
        )
        middle = sorted(found, key=lambda x: x.summary["tokens_per_second"])[len(found) // 2].summary
        rounds, forward = middle["rounds"], middle["seconds_by_part"]["forward"]
        share = read[case.weights] * rounds / forward / bandwidth
        rows.append([
            case.weights, case.drafter, str(case.batch), str(case.temperature), str(case.ranks), spread(speeds),
            "-" if ratio is None else f"{ratio:.2f}", f"{middle['mean_acceptance_length']:.2f}", same,
            f"{read[case.weights] * rounds / middle['output_tokens'] / 1e6:.0f}", f"{share:.0%}",
            f"{1e3 * forward / rounds:.1f}", f"{1e3 * (middle['seconds'] - forward) / rounds:.1f}",
        ])  # fmt: skip
    return table(head, rows)


def parts(outcomes: dict[Case, list[Outcome]]) -> str:
    """Seconds by part of the last turn, prompts included; what is left of the wall is "rest"."""
    rows = []
    for case, found in outcomes.items():
        summary = found[-1].summary
        seconds = [summary["seconds_by_part"][name] for name in PARTS]
        seconds += [summary["seconds"] - sum(seconds), summary["seconds"]]
        name = f"{case.weights}, {case.drafter}, batch {case.batch}, temperature {case.temperature}, {case.ranks} ranks"
        rows.append([name, *(f"{x:.2f}" for x in seconds)])
    return table(["seconds", *PARTS, "rest", "all"], rows)


def plot(outcomes: dict[Case, list[Outcome]], path: Path, heading: str) -> None:
    """Tokens a second by batch: a panel for each temperature and number of ranks, a line for each of weights and drafter."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = sorted({(case.temperature, case.ranks) for case in outcomes})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), sharey=True, squeeze=False)
    colours = dict(zip(DRAFTERS, ("tab:gray", "tab:blue", "tab:green", "tab:orange"), strict=True))
    for panel, (temperature, ranks) in zip(axes[0], panels, strict=True):
        for weights, drafter in product(WEIGHTS, DRAFTERS):
            wanted = (weights, drafter, temperature, ranks)
            cases = [c for c in outcomes if (c.weights, c.drafter, c.temperature, c.ranks) == wanted]
            speeds = [[x.summary["tokens_per_second"] for x in outcomes[case]] for case in cases]
            if cases:
                middle = [statistics.median(each) for each in speeds]
                errors = [[m - min(s) for m, s in zip(middle, speeds, strict=True)],
                          [max(s) - m for m, s in zip(middle, speeds, strict=True)]]  # fmt: skip
                style = "-" if weights == "int4" else "--"
                batches = [case.batch for case in cases]
                panel.errorbar(batches, middle, errors, label=f"{weights}, {drafter}", color=colours[drafter], ls=style,
                               marker="o", capsize=3)  # fmt: skip
        title = f"temperature {temperature}, {ranks} rank{'s' * (ranks > 1)}"
        panel.set(title=title, xlabel="sequences at once", xscale="log", yscale="log")
        ticks = sorted({case.batch for case in outcomes})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens/s")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(heading)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="such as `bench.enlarge` makes")
    parser.add_argument("--draft-model", type=Path, default=ROOT / "configs/demo/draft")
    parser.add_argument("--prompts", type=Path, default=DEMO, help="batch file, Spec-Bench's question.jsonl, folder of texts")
    parser.add_argument("--count", type=int, default=16, help="prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=list(DRAFTERS))
    parser.add_argument("--drafts", default="5", help="speculation.num_speculative_tokens")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="that share the processor's cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="by default one turn, batch 1 and 4, greedy, 4 prompts, 32 tokens")
    parser.add_argument("--output", type=Path, help="where the table (.md) and the plot (.png) go; by default only printed")
    if "--quick" in sys.argv:
        parser.set_defaults(repeats=1, batch=[1, 4], temperature=[0.0], count=4, new_tokens=32)
    given = parser.parse_args()
    cases = [Case(*each) for each in product(given.weights, given.drafters, given.batch, given.temperature, given.ranks)]
    threads = len(os.sched_getaffinity(0))
    before = read_bandwidth(threads)
    read = {weights: bytes_read(weights, given) for weights in given.weights}
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = measure(cases, given, Path(scratch))
    bandwidth = max(before, read_bandwidth(threads))
    text = (
        f"{describe()}; {bandwidth / 1e9:.1f} GB/s read by {threads} threads\n\n"
        f"    {' '.join(['python -m bench.job', *sys.argv[1:]])}\n\n"
        f"{report(outcomes, read, bandwidth)}\n\n{parts(outcomes)}\n"
    )
    print(text)
    if given.output:
        given.output.with_suffix(".md").write_text(text)
        plot(outcomes, given.output.with_suffix(".png"), given.model.name)


if __name__ == "__main__":
    main()
