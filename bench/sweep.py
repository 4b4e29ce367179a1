"""`python -m bench.sweep`: numbers of drafts that are chosen from batch 1 to 256, without a model.

What rounds take and how likely drafts are to stand is given, the choice is the coordinator's own. Rounds are bound by
weights up to a knee, and by arithmetic from there on.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from bench.tables import table
from runtime.acceptance import Acceptance, Counts
from runtime.costs import Costs, Effort, RoundCosts
from runtime.sequence import Sampling, Sequence
from runtime.tuner import Tuner
from runtime.verify import Decision

LOOKUPS, WIDTH, LEASE = 4, 32, 4
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096, 16384]
TEXTS = {  # how often a match has length 0 to 4, and how likely a draft of each length stands
    "ordinary": ([0.35, 0.3, 0.15, 0.1, 0.1], [0.15, 0.3, 0.45, 0.6]),
    "repetitive": ([0.05, 0.05, 0.05, 0.1, 0.75], [0.5, 0.7, 0.9, 0.97]),
}


def seconds(rows: float, knee: float) -> float:
    """Of a round: weights are read once, and every row beyond the knee costs its arithmetic."""
    return 0.01 * (1 + 0.005 * rows + max(0.0, rows - knee) / knee)


def play(
    batch: int, text: str, knee: float, rounds: int, rng: np.random.Generator, fixed: int | None = None, wrong: float = 1.0,
    learnt: float = 0.5,
) -> tuple[float, float]:  # fmt: skip
    """Tokens/s, and drafts a round and sequence, in all rounds but the first `learnt` of them, which only teach.

    wrong: what the table at the start makes of a round with any drafts, in true seconds. One round takes some per cent more
    or less than the next, and one in thirty half as much again.
    """
    found, rates = TEXTS[text]
    measured = Costs(ROWS, [32], [seconds(rows, knee) * (wrong if rows > batch else 1.0) for rows in ROWS])
    tuner = Tuner(RoundCosts(measured), Acceptance(batch, Counts((LOOKUPS, WIDTH))), WIDTH, LOOKUPS, False)
    sequences = [Sequence(i, i, [1] * 100, 1, 10**6, frozenset(), Sampling()) for i in range(batch)]
    allowed = np.full((batch, LOOKUPS), fixed or 0)
    tokens = taken = drafted = 0.0
    for number in range(rounds):
        if fixed is None and number % LEASE == 0:
            allowed = np.array(tuner.choose(sequences)[:batch])
        source = rng.choice(LOOKUPS + 1, p=found, size=batch)
        drafts = np.where(source > 0, allowed[np.arange(batch), source - 1], 0)
        stands = rng.random((batch, WIDTH)) < np.array([0.0, *rates])[source][:, None]
        stood = np.minimum(drafts, np.cumprod(stands, axis=1).sum(1))
        asked = np.where(allowed.any(1), source, -1).astype(np.int32)
        rows = batch + int(drafts.sum())
        true = seconds(rows, knee)
        told = true * math.exp(0.06 * rng.standard_normal()) * (1.5 if rng.random() < 0.03 else 1.0)
        effort = Effort(told, 0.0, rows)
        slots, none = np.arange(batch, dtype=np.int32), np.zeros(0, np.int32)
        decision = Decision(slots, drafts.astype(np.int32), (stood + 1).astype(np.int32), none)
        tuner.observe(decision, asked, effort, dict(enumerate(sequences)))
        if number >= learnt * rounds:
            tokens, taken = tokens + batch + float(stood.sum()), taken + true
            drafted += float(drafts.mean())
    return tokens / taken, drafted / (rounds * (1 - learnt))


def short(batch: int, text: str, knee: float, rounds: int, jobs: int, rng: np.random.Generator, drafts: list[int]) -> float:
    """Tokens/s of chosen numbers to the best of these fixed ones and none, over whole jobs of so many rounds: all of them run
    the same jobs."""
    seeds = rng.integers(2**32, size=jobs)
    chosen, *fixed = (
        sum(play(batch, text, knee, rounds, np.random.default_rng(seed), number, learnt=0.0)[0] for seed in seeds)
        for number in (None, 0, *drafts)
    )
    return chosen / max(fixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 5, 8, 16])
    parser.add_argument("--knee", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--short", type=int, default=80, help="rounds of jobs that are counted from their first round on")
    parser.add_argument("--jobs", type=int, default=20, help="such jobs")
    parser.add_argument("--wrong", type=float, nargs="+", default=[0.6, 2.0], help="factors of tables that mislead")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    lines = []
    for text in TEXTS:
        for batch in given.batches:
            plain, _ = play(batch, text, given.knee, given.rounds, rng, 0)
            fixed = {k: play(batch, text, given.knee, given.rounds, rng, k)[0] / plain for k in given.drafts}
            best = max(fixed, key=lambda k: fixed[k]) if max(fixed.values()) > 1 else 0
            most = max(1.0, *fixed.values()) * plain
            speed, drafts = play(batch, text, given.knee, given.rounds, rng)
            misled = [play(batch, text, given.knee, given.rounds, rng, None, wrong)[0] / most for wrong in given.wrong]
            lines.append([
                text, str(batch), f"{drafts:.2f}", f"{speed / plain:.2f}", str(best), f"{most / plain:.2f}",
                f"{speed / most:.2f}", f"{short(batch, text, given.knee, given.short, given.jobs, rng, given.drafts):.2f}",
                *(f"{share:.2f}" for share in misled),
            ])  # fmt: skip
    print("Tokens/s to no drafts.\n")
    header = ["text", "batch", "drafts chosen", "auto", "best fixed k", "its tokens/s", "auto to the best"]
    header.append(f"{given.short} rounds in all")
    print(table([*header, *(f"misled, {wrong:g}" for wrong in given.wrong)], lines))


if __name__ == "__main__":
    main()
