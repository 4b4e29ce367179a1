"""How many drafts of whom are worth their time: the numbers that give most tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Seconds = Callable[[Array], Array]
DraftSeconds = Callable[[Array, Array], Array]

DEPTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56)  # of a model's chains, and the deepest


@dataclass(frozen=True, slots=True)
class Allocation:
    """counts: drafts of every offer, int64 [N]. tokens, seconds: what is expected of a round with them."""

    counts: Indices
    tokens: float
    seconds: float


def allocate(
    stands: Array, shares: Array, chained: NDArray[np.bool_], base: float, rows: float, seconds: Seconds,
    drafting: DraftSeconds, owners: Indices, floor: float = 0.0,
) -> Allocation:  # fmt: skip
    """The numbers of drafts with the most expected tokens per second.

    stands: [N, K], the chance that draft j of offer n stands and all before it, which never rises along K. shares: [N], how
    often the offer is made. chained: [N], whether it is drafted step by step by a model. base: tokens that a round decides
    without any draft; rows: that it computes. seconds(rows) is what a round takes, drafting(steps, rows) what the model takes
    for that many tokens in that many steps. owners: [N], the sequence to which the offer is made, one at most in a round.
    floor: drafts with no more chance than this are left out, as no row is cheap enough for them.

    A draft adds as many tokens as it has a chance to stand, and one row, wherever it is. So for any number of rows the
    likeliest drafts are the best ones, and the best number is found by looking at each: whatever the form of `seconds`,
    this is the maximum where all shares are 1. A model's steps are shared by its chains: each depth is looked at in turn.

    Where they are less, rounds differ, and a long draft costs the rounds in which it is made: see `prices`.
    """
    places = np.arange(1, stands.shape[1] + 1)
    gains, weights = stands.ravel(), np.repeat(shares, len(places))
    of_model, depth_of, owner_of = np.repeat(chained, len(places)), np.tile(places, len(shares)), np.repeat(owners, len(places))
    order = np.argsort(-gains, kind="stable")  # so that of equals the earlier position comes first
    order = order[(weights[order] > 0) & (gains[order] > floor)]
    plain = float(seconds(np.array([rows]))[0])
    best, picked = Allocation(np.zeros(len(stands), np.int64), base, plain), order[:0]
    for depth in depths(int((depth_of * of_model)[order].max(initial=0))):
        usable = order[~of_model[order] | (depth_of[order] <= depth)]
        if not len(usable):
            continue
        weight = weights[usable]
        drafted = np.cumsum(weight * of_model[usable])
        tokens = base + np.cumsum(weight * gains[usable])
        taken = plain + np.cumsum(prices(weight, depth_of[usable], owner_of[usable], rows, seconds))
        taken += drafting(np.array(float(depth)), drafted)
        most = int(np.argmax(tokens / taken))
        if tokens[most] / taken[most] > best.tokens / best.seconds:
            picked = usable[: most + 1]
            best = Allocation(best.counts, float(tokens[most]), float(taken[most]))
    counts = np.bincount(picked // len(places), minlength=len(stands))
    return Allocation(counts.astype(np.int64), best.tokens, best.seconds)


def prices(weights: Array, places: Indices, owners: Indices, rows: float, seconds: Seconds) -> Array:
    """What each of these drafts adds to the mean seconds of a round, if they are taken up in turn: [N].

    weights: [N], how often the offer is made that a draft belongs to. places: [N], which of its drafts it is, from 1 on, each
    behind those before it. owners: [N], the sequence to which it is made. rows: of a round without drafts.

    Such a draft is one row more in just those rounds in which its offer is made. They have all that came before it in this
    offer and, of other sequences, what these happen to find: that is taken to be nothing or a certain number, with the mean and
    the variance that it has. So prices are exact for one sequence, and where every offer is always made.
    """
    grown = weights * (2 * places - 1)  # what a draft adds to the mean square of its sequence's drafts
    mean, square = before(np.stack([weights, grown]), owners)
    spread = grown - weights * (2 * mean + weights)  # and to the variance
    others = np.cumsum(weights) - weights - mean
    whole = np.maximum(0.0, np.cumsum(spread) - spread - (square - mean**2)) + others**2
    some = np.divide(whole, others, out=np.zeros_like(whole), where=others > 0)
    often = np.divide(others, some, out=np.zeros_like(whole), where=some > 0)
    alone = np.diff(seconds(rows + np.arange(places.max() + 1.0)))[places - 1]
    with_some, less_one = seconds(rows + np.stack([some, some - 1]) + places)
    added: Array = weights * (often * (with_some - less_one) + (1 - often) * alone)
    return added


def before(values: Array, owners: Indices) -> Array:
    """Of every value [..., N], the sum of those before it that have the same owner: [..., N]."""
    order = np.argsort(owners, kind="stable")
    sorted_, owned = values[..., order], owners[order]
    sums = np.cumsum(sorted_, axis=-1) - sorted_
    found = np.empty_like(values)
    found[..., order] = sums - sums[..., np.searchsorted(owned, owned)]
    return found


def allocate_evenly(
    stands: Array, shares: Array, chained: NDArray[np.bool_], base: float, rows: float, seconds: Seconds, drafting: DraftSeconds
) -> Allocation:
    """The same where every sequence's rows are as many as the longest draft needs: one number for all offers."""
    best = Allocation(np.zeros(len(stands), np.int64), base, float(seconds(np.array([rows]))[0]))
    for depth in depths(stands.shape[1]):
        tokens = base + float((shares * stands[:, :depth].sum(1)).sum())
        chains = float(shares[chained].sum())
        taken = float(seconds(np.array([rows * (depth + 1)]))[0] + drafting(np.array(float(depth)), np.array(depth * chains)))
        if tokens / taken > best.tokens / best.seconds:
            best = Allocation(np.full(len(stands), depth), tokens, taken)
    return best


def depths(most: int) -> list[int]:
    """Some of the numbers from 0 to `most`, and these two."""
    return [*(depth for depth in DEPTHS if depth < most), most]
