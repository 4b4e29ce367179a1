"""Chosen numbers of drafts over whole short jobs, learning included, beside every fixed number over the same jobs."""

from __future__ import annotations

import numpy as np
import pytest

from bench.sweep import short

DRAFTS = [1, 2, 3, 5, 8, 16]


@pytest.mark.parametrize("text", ["ordinary", "repetitive"])
def test_a_short_job_is_about_as_fast_as_with_the_best_number(text: str, seed: int) -> None:
    """Rounds of 12 rows cost half as much again as those of 4: what a long draft costs that is seldom found is seen here."""
    assert short(4, text, 8, 80, 24, np.random.default_rng(seed), DRAFTS) > 0.95
