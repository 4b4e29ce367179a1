"""Top-k, top-p and min-p over slices of the vocabulary: every rank finds the same cut-off without seeing all logits.

A token is left if its key (`runtime/order.py`) is at or above its row's cut-off. For a cut-off ranks exchange their best
candidates; what lies above the best of all last candidates is then known completely. Where that doesn't reach the
cut-off, the rows concerned - and no others, or their number would show - exchange longer lists, up to the whole slice.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from runtime.comm import Communicator
from runtime.order import NONE, Keys, best_keys, keys_of, lowest_key, values_of
from runtime.sequence import Sampling
from runtime.softmax import exp, sums

WIDTH = 64  # candidates of a rank in the first exchange
WIDER = 16  # times as many in each that follows


def left(scaled: Tensor, samplings: list[Sampling], comm: Communicator, first: int) -> Tensor:
    """Which tokens min-p, top-k and top-p leave, in this order, as in vLLM; bool [R, V/ranks].

    scaled: float32 [R, V/ranks], logits over temperature, forbidden ones -inf; samplings: of the rows; first: id of the
    slice's first token. min-p leaves tokens at least `min_p` times as likely as the likeliest; top-k the k likeliest, the
    smaller id on ties; top-p, of what these leave, each token before which less than `top_p` of the mass lies: one at
    least. All ranks call this with the same rows, in step. A NaN counts as forbidden here. Raises PeerLost.
    """
    scaled = scaled.where(~scaled.isnan(), -torch.inf)
    keys = keys_of(scaled, torch.arange(first, first + scaled.shape[1], device=scaled.device))
    pending = list(range(len(samplings)))
    cuts = np.full(len(samplings), NONE, np.int64)
    width = WIDTH
    lists = _exchange(keys, width, comm)
    tops = values_of(lists[:, :, 0].max(0)).astype(np.float64)
    floors = [top + math.log(s.min_p) if s.min_p > 0 else -math.inf for top, s in zip(tops.tolist(), samplings, strict=True)]
    totals = _totals(scaled, samplings, tops, floors, comm)
    while True:
        unresolved = []
        for place, row in enumerate(pending):
            cut = cut_off(lists[:, place], floors[row], totals.get(row), samplings[row])
            if cut is None:
                unresolved.append(row)
            else:
                cuts[row] = cut
        if not unresolved:
            return keys >= torch.from_numpy(cuts).to(keys.device)[:, None]
        pending, width = unresolved, width * WIDER
        lists = _exchange(keys[pending], width, comm)


def cut_off(lists: Keys, floor: float, total: float | None, sampling: Sampling) -> int | None:
    """The smallest key that a row leaves, or None if the lists are too short to know.

    lists: int64 [ranks, N], every rank's best in order, ending in NONE where its slice has no more. floor: the least value
    that min-p leaves. total: mass of all at or above it, relative to the best; None where top-k says what counts.
    """
    last = lists[:, -1]
    bound = int(last.max())  # below it a token may be missing; NONE where no slice has more
    known = np.sort(lists[lists >= max(bound, NONE + 1)])[::-1]
    values = values_of(known).astype(np.float64)
    if not math.isfinite(values[0]):
        return NONE  # all are forbidden, or one is infinitely likely: nothing to filter by
    if not sampling.top_k and sampling.top_p >= 1:
        return lowest_key(floor)
    count = int((values >= floor).sum())
    whole = bound == NONE or count < len(known)
    if sampling.top_k and count >= sampling.top_k:
        count, whole = sampling.top_k, True
    if sampling.top_p < 1:
        if total is None and not whole:
            return None
        masses = np.cumsum(exp(torch.from_numpy(values[:count] - values[0])).numpy())  # one after another: fixed bits
        before = int((masses < sampling.top_p * (masses[-1] if total is None else total)).sum())
        if before < count:
            return int(known[before])
    return int(known[count - 1]) if whole else None


def _exchange(keys: Tensor, width: int, comm: Communicator) -> Keys:
    """Every rank's `width` best of every row: [R, V/ranks] -> int64 [ranks, R, width]."""
    lists: Keys = comm.all_gather(best_keys(keys, width)).cpu().numpy()
    return lists


def _totals(
    scaled: Tensor, samplings: list[Sampling], tops: np.ndarray, floors: list[float], comm: Communicator
) -> dict[int, float]:
    """For rows with top-p and without top-k: the mass of what min-p leaves, relative to the likeliest token."""
    rows = [i for i, s in enumerate(samplings) if s.top_p < 1 and not s.top_k]
    if not rows:
        return {}
    device = scaled.device
    mine = sums(
        scaled[rows],
        torch.from_numpy(tops[rows]).to(device),
        torch.tensor([floors[row] for row in rows], dtype=torch.float64, device=device),
    )
    totals = [0.0] * len(rows)
    for part in comm.all_gather(mine).tolist():  # added in rank order
        totals = [a + b for a, b in zip(totals, part, strict=True)]
    return dict(zip(rows, totals, strict=True))
