"""Top-k, top-p and min-p over slices of the vocabulary: every rank finds the same cut-off without seeing all logits.

A token is left if its key (`runtime/order.py`) is at or above its row's cut-off. For a cut-off ranks exchange their best
candidates, and the masses of their slices; what lies above the best of all last candidates is then known completely. Where
that doesn't reach the cut-off, the rows concerned - and no others, or their number would show - exchange longer lists, up to
the whole slice.

One exchange is a fixed number of operations on fixed shapes, and looks at no value: it can be part of a graph on a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.comm import Communicator
from runtime.kernels import select
from runtime.order import NONE, lowest_keys, values_in
from runtime.sequence import Sampling
from runtime.softmax import exp, merge_sums, running

WIDTH = 64  # candidates of a rank in the first exchange
WIDER = 16  # times as many in each that follows


@dataclass(frozen=True, slots=True)
class Limits:
    """What R rows filter by. top_k: int64 [R], 0 for no limit; top_p: float64 [R], 1 for none; log_min_p: float64 [R], -inf
    for none."""

    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor

    @classmethod
    def of(cls, samplings: list[Sampling], device: torch.device) -> Limits:
        rows = [limits_of(sampling) for sampling in samplings]
        top_k, top_p, log_min_p = torch.tensor(rows, dtype=torch.float64).view(len(rows), 3).to(device).unbind(1)
        return cls(top_k.long(), top_p, log_min_p)

    def __getitem__(self, rows: Tensor | slice) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.log_min_p[rows])

    @property
    def by_mass(self) -> Tensor:
        """Rows for which the mass of all tokens counts, and not only that of those which other filters leave; bool [R]."""
        return (self.top_p < 1) & (self.top_k == 0) & self.log_min_p.isneginf()

    def repeat(self, count: int) -> Limits:
        """Each row `count` times."""
        return Limits(*(x.repeat_interleave(count) for x in (self.top_k, self.top_p, self.log_min_p)))


def limits_of(sampling: Sampling) -> tuple[int, float, float]:
    """A row's part of `Limits`."""
    if not sampling.filters:
        return 0, 1.0, -math.inf
    return sampling.top_k, sampling.top_p, math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf


def cut_offs(logits: Tensor, temperatures: Tensor, limits: Limits, comm: Communicator, first: int) -> Tensor:
    """The smallest keys that min-p, top-k and top-p leave, in this order, as in vLLM; int64 [R], NONE where all is left.

    logits: [R, V/ranks], any float dtype, forbidden ones -inf; temperatures: float32 [R]; first: id of the slice's first
    token. min-p leaves tokens at least `min_p` times as likely as the likeliest; top-k the k likeliest, the smaller id on
    ties; top-p, of what these leave, each token before which less than `top_p` of the mass lies: one at least. All ranks
    call this with the same rows, in step. A NaN counts as forbidden here. Raises PeerLost.
    """
    width, heavy = WIDTH, torch.nonzero(limits.by_mass).flatten()
    masses = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    masses[heavy] = select(logits.device).masses(logits[heavy], temperatures[heavy])
    cuts, known = look(logits, temperatures, masses, limits, comm, first, width)
    while len(pending := torch.nonzero(~known).flatten()):
        width *= WIDER
        cuts[pending], known[pending] = look(
            logits[pending], temperatures[pending], masses[pending], limits[pending], comm, first, width
        )  # fmt: skip
    return cuts


def look(
    logits: Tensor, temperatures: Tensor, masses: Tensor, limits: Limits, comm: Communicator, first: int, width: int
) -> tuple[Tensor, Tensor]:
    """One exchange of `width` candidates: `cut_offs` int64 [R], and bool [R], whether the candidates reach as far.

    masses: float64 [R], of the slice's tokens (`kernels.masses`), where they count.
    """
    keys = select(logits.device).candidates(logits, temperatures, width, first)
    parts = comm.all_gather(torch.cat([keys, masses.view(torch.int64)[:, None]], dim=1))
    return settle(parts[:, :, :-1], parts[:, :, -1].contiguous().view(torch.float64), limits)


def settle(lists: Tensor, masses: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """`look`, from what the ranks have said.

    lists: int64 [ranks, R, N], every rank's best in order, ending in NONE where its slice has no more. masses: float64
    [ranks, R], of the slices, relative to their best.
    """
    bound = lists[:, :, -1].amax(0)  # below it a token may be missing; NONE where no slice has more
    keys = lists.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
    values = values_in(keys).double()
    top = values[:, :1]
    finite = top.isfinite()  # else all are forbidden, or one is infinitely likely: nothing to filter by
    floor = top + limits.log_min_p[:, None]
    listed = (keys > NONE) & (keys >= bound[:, None])
    above = listed & (values >= floor)
    count = above.sum(1)
    whole = (bound == NONE) | (count < listed.sum(1))
    enough = (limits.top_k > 0) & (count >= limits.top_k)
    count, whole = torch.where(enough, limits.top_k, count), whole | enough
    last = (count - 1).clamp(min=0)[:, None]

    counted = torch.arange(keys.shape[1], device=keys.device) < count[:, None]
    mass = running(exp((values - top).where(counted & finite, 0.0)).where(counted, 0.0))
    _, every = merge_sums(values_in(lists[:, :, 0]).double(), masses)
    total = mass.gather(1, last)[:, 0].where(whole, every)
    before = (counted & (mass < (limits.top_p * total)[:, None])).sum(1)
    by_mass = (limits.top_p < 1) & (before < count)
    cuts = keys.gather(1, torch.where(by_mass[:, None], before[:, None], last))[:, 0]
    known = whole | (by_mass & limits.by_mass)
    by_floor = (limits.top_k == 0) & (limits.top_p >= 1)
    cuts, known = torch.where(by_floor, lowest_keys(floor[:, 0]), cuts), known | by_floor | ~finite[:, 0]
    return cuts.where(finite[:, 0], NONE), known
