"""`python -m bench.drafts`: numbers of drafts that are chosen, beside every fixed one and none.

Whole jobs on one rank, in one process that loads the models once: batches, drafters, ordinary prompts (the demo's) and
repetitive ones (a piece of each, three times over). All settings of a cell run one after the other, and all cells `--repeats`
times; what is chosen is compared within a turn, with the setting that was the best in the middle of all turns. Trying out what
rounds take, two seconds of a job's start, isn't timed, as loading isn't. `--model` takes another checkpoint with the demo's
tokenizer, such as one that `bench.enlarge` made.

With `--charged` that model is only tried out; then the demo's writes, on a clock that charges its rounds what the other took.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.charged import charged
from bench.inprocess import greedy, run, start
from bench.jobs import ROOT
from bench.machine import describe
from bench.prompts import demo_texts
from bench.tables import table
from configs.schema import RunConfig
from runtime.comm import Solo
from runtime.costs import Costs
from runtime.request import Request
from workers.models import Models, load_models

DEMO = ROOT / "configs/demo"
PIECE = 240  # characters that a repetitive prompt repeats
KINDS = ("ordinary", "repetitive")
METHODS = ("ngram", "suffix", "model", "auto")
NONE, AUTO = "none", "auto"


@dataclass(frozen=True)
class Cell:
    kind: str  # of prompts
    method: str
    batch: int


def configuration(given: argparse.Namespace, batch: int, method: str, drafts: str) -> RunConfig:
    return RunConfig.model_validate({
        "model": {"target": str(given.model), "lm_head": given.head},
        "speculation": {"method": method, "model": str(given.draft_model), "num_speculative_tokens": drafts},
        "engine": {"device": "cpu", "max_num_seqs": batch, "max_model_len": 512, "threads": given.threads},
    })  # fmt: skip


def requests(given: argparse.Namespace, kind: str, batch: int) -> list[Request]:
    """At least two for every place in a batch."""
    texts = list(itertools.islice(itertools.cycle(demo_texts()), max(given.count, 2 * batch)))
    if kind == "repetitive":
        texts = [3 * (text[:PIECE].rstrip("\n") + "\n") for text in texts]
    return greedy(given.model, texts, given.new_tokens)


class Measurement:
    """Tokens/s of every job, by cell and setting, a value a turn. costs: by batch, what rounds are charged, if they are."""

    def __init__(self, given: argparse.Namespace, models: Models, costs: dict[int, Costs]) -> None:
        self._given = given
        self._models = models
        self._costs = costs
        self._rng = np.random.default_rng(0)
        self._outputs: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {}
        self.speeds: dict[Cell, dict[str, list[float]]] = {}

    def turn(self) -> None:
        """Every job once. No drafter is the same for all methods, and runs once for them."""
        for kind, batch in itertools.product(self._given.prompts, self._given.batches):
            plain = self._job(kind, batch, NONE, "0")
            for method in self._given.methods:
                cell = self.speeds.setdefault(Cell(kind, method, batch), {})
                cell.setdefault(NONE, []).append(plain)
                for drafts in (*self._given.drafts, AUTO):
                    cell.setdefault(drafts, []).append(self._job(kind, batch, method, drafts))
                print(kind, method, batch, {name: round(x[-1], 1) for name, x in cell.items()}, file=sys.stderr, flush=True)

    def _job(self, kind: str, batch: int, method: str, drafts: str) -> float:
        costs, config = self._costs.get(batch), configuration(self._given, batch, method, drafts)
        with charged(costs, self._rng) if costs else nullcontext():
            numbers = run(config, requests(self._given, kind, batch), self._models)
        wanted = self._outputs.setdefault((kind, batch), numbers.outputs)
        assert numbers.outputs == wanted, "numbers of drafts changed the output"
        return numbers.tokens_per_second

    def row(self, cell: Cell) -> list[str]:
        speeds = self.speeds[cell]
        middle = {name: statistics.median(each) for name, each in speeds.items()}
        best = max((name for name in speeds if name != AUTO), key=lambda name: middle[name])
        turns = [mine / theirs for mine, theirs in zip(speeds[AUTO], speeds[best], strict=True)]
        shown = [f"{middle[name] / middle[NONE]:.2f}" for name in (*self._given.drafts, AUTO)]
        ends = f" ({min(turns):.2f}-{max(turns):.2f})" if len(turns) > 1 else ""
        return [cell.kind, cell.method, str(cell.batch), f"{middle[NONE]:.0f}", *shown, f"{statistics.median(turns):.2f}{ends}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "target-int4")
    parser.add_argument("--head", choices=["16bit", "int8", "screened"], default="16bit", help="how the output head is held")
    parser.add_argument("--draft-model", type=Path, default=DEMO / "draft")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--drafts", nargs="+", default=["1", "3", "5", "8"])
    parser.add_argument("--count", type=int, default=8, help="requests at least; or two for every place in a batch")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--charged", action="store_true", help="let the demo's model write at the other's cost")
    given = parser.parse_args()
    models, costs = load(given), {}
    if given.charged:
        costs = {batch: tried(given, models, batch) for batch in given.batches}
        given.model, given.head = DEMO / "target-int4", "16bit"
        models = load(given)
    measurement = Measurement(given, models, costs)
    for _ in range(given.repeats):
        measurement.turn()
    print(f"{describe()}, {given.threads} threads\n")
    print("Tokens/s, to no drafter; last: the chosen numbers, to the best of all others, and the turns' ends.\n")
    head = ["prompts", "drafter", "batch", "tokens/s without", *given.drafts, AUTO, "auto to the best"]
    print(table(head, (measurement.row(cell) for cell in measurement.speeds)))


def tried(given: argparse.Namespace, models: Models, batch: int) -> Costs:
    """What this model's rounds, and a draft model's steps, take at this batch."""
    costs = start(configuration(given, batch, "auto", AUTO), models)[1].costs
    assert costs is not None, "where numbers of drafts are chosen, rounds are tried out"
    return costs


def load(given: argparse.Namespace) -> Models:
    return load_models(configuration(given, 1, "model", AUTO), Solo(), Solo(), torch.device("cpu"), aloud=False)


if __name__ == "__main__":
    main()
