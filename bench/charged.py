"""A clock that is told what rounds take: a small model writes, and is charged what a large one took.

So what else a host does is no part of what is compared. What the coordinator takes is left out as well.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from runtime.batch import Batch
from runtime.check import Check
from runtime.costs import Costs, RoundCosts
from runtime.drafting.model import ModelDrafter
from runtime.engine import Engine, Round
from runtime.sampling import Choice

NOISE = 0.05  # standard deviation of a round's logarithm
DISTURBED, MORE = 0.03, 1.5  # share of rounds that something disturbs, and what they take then


@contextmanager
def charged(costs: Costs, rng: np.random.Generator) -> Iterator[None]:
    """While this lasts, `time.perf_counter` advances by nothing but rounds and steps of a draft model, more or less."""
    table, now = RoundCosts(costs), 0.0
    verify, sample = Engine.verify, ModelDrafter._sample

    def clock() -> float:
        return now

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds * math.exp(NOISE * rng.standard_normal()) * (MORE if rng.random() < DISTURBED else 1.0)

    def verified(engine: Engine, round_: Round) -> Choice:
        choice = verify(engine, round_)
        if round_.works:
            rows = sum(work.count for work in round_.works) + len(round_.drafts)
            context = statistics.mean(work.start + work.count for work in round_.works)
            with engine.clock.part("forward"):
                spend(float(table.seconds(np.array(float(rows)), context)))
        return choice

    def sampled(drafter: ModelDrafter, checks: list[Check], batch: Batch) -> list[int]:
        spend(costs.step + costs.row * len(checks))
        return sample(drafter, checks, batch)

    with (
        mock.patch.object(time, "perf_counter", clock),
        mock.patch.object(Engine, "verify", verified),
        mock.patch.object(ModelDrafter, "_sample", sampled),
    ):
        yield
