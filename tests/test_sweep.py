"""Chosen numbers of drafts over whole short jobs, learning included, beside every fixed number over the same jobs; and a clock
that is told what rounds take."""

from __future__ import annotations

import time
from argparse import Namespace

import numpy as np
import pytest

from bench.charged import charged
from bench.drafts import DEMO, configuration, load, requests
from bench.inprocess import run
from bench.sweep import short
from runtime.costs import Costs

DRAFTS = [1, 2, 3, 5, 8, 16]


@pytest.mark.parametrize("text", ["ordinary", "repetitive"])
def test_a_short_job_is_about_as_fast_as_with_the_best_number(text: str, seed: int) -> None:
    """Rounds of 12 rows cost half as much again as those of 4: what a long draft costs that is seldom found is seen here."""
    assert short(4, text, 8, 80, 24, np.random.default_rng(seed), DRAFTS) > 0.95


@pytest.mark.parametrize("drafts", ["0", "5"])
def test_a_charged_job_takes_what_its_rounds_are_said_to_take(drafts: str, seed: int) -> None:
    """A second each, but for noise: a job's tokens a second are its tokens a round."""
    given = Namespace(
        model=DEMO / "target-int4", draft_model=DEMO / "draft", head="16bit", threads=1, count=6, new_tokens=24
    )
    models, before = load(given), time.perf_counter()
    with charged(Costs([1, 64], [32], [1.0, 1.0]), np.random.default_rng(seed)):
        numbers = run(configuration(given, 1, "ngram", drafts), requests(given, "ordinary", 1), models)
    assert numbers.tokens_per_second == pytest.approx(numbers.mean_acceptance_length, rel=0.1)
    assert (numbers.mean_acceptance_length > 1.2) == (drafts == "5")
    assert before < time.perf_counter() < before + 600, "the clock is the machine's again"
