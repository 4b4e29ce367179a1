"""How likely drafts are to stand, by where they come from and by their position."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

JOB_MEMORY, MEMORY = 0.995, 0.95  # what is left of an observation after the next one, in the job and in one sequence
PRIOR = 16.0  # observations that a prior counts for: what is chosen is also what happens to look best
UNKNOWN = 0.75  # chance of a draft of which nothing is known yet: what is not tried is not learnt


@dataclass(slots=True)
class Counts:
    """Drafts tried and drafts that stood, old ones fading: [..., sources, width]. found: [..., sources + 1], how often drafts
    came from each source, first of all from nowhere.

    A source is where a draft comes from: a match of some length, or a model. A draft is tried if all before it stood, so
    that a rate is the chance of one more.
    """

    shape: tuple[int, ...]
    tried: Array = field(init=False)
    stood: Array = field(init=False)
    found: Array = field(init=False)

    def __post_init__(self) -> None:
        self.tried, self.stood = np.zeros((2, *self.shape))
        self.found = np.zeros((*self.shape[:-2], self.shape[-2] + 1))


@dataclass(slots=True)
class Acceptance:
    """What stood so far in every slot of a group, beside what stood in the whole job.

    job: [sources, width], shared by all groups. Slot -1 is nobody's, and so as the job is.
    """

    slots: int
    job: Counts
    own: Counts = field(init=False)  # [slots + 1, sources, width]

    def __post_init__(self) -> None:
        self.own = Counts((self.slots + 1, *self.job.shape))

    def forget(self, slot: int) -> None:
        """Another sequence takes the slot."""
        self.own.tried[slot] = self.own.stood[slot] = 0.0
        self.own.found[slot] = 0.0

    def observe(self, slots: Indices, sources: Indices, num_drafts: Indices, num_stood: Indices) -> None:
        """Takes in the checks of a round, one entry each [N], slots all different. Source 0: nothing was found."""
        own, job = self.own, self.job
        own.found[slots] *= MEMORY
        own.found[slots, sources] += 1
        job.found *= JOB_MEMORY ** len(slots)
        job.found += np.bincount(sources, minlength=len(job.found))
        some = sources > 0
        slots, sources, num_drafts, num_stood = slots[some], sources[some] - 1, num_drafts[some], num_stood[some]
        checks = np.bincount(sources[num_drafts > 0], minlength=len(job.tried))
        place = np.arange(job.tried.shape[-1])
        tried, stood = place < np.minimum(num_drafts, num_stood + 1)[:, None], place < num_stood[:, None]
        for mine, whole, seen in ((own.tried, job.tried, tried), (own.stood, job.stood, stood)):
            mine[slots, sources] = MEMORY * mine[slots, sources] + seen
            whole *= JOB_MEMORY ** checks[:, None]
            np.add.at(whole, sources, seen)

    def stands(self, slots: Indices) -> Array:
        """[N, sources, width]: the chance that a draft stands, and all before it.

        A sequence's rate at a position is drawn to its own rate at all positions, shaped as the job's rates are; that one
        to the job's. So what hardly anything is known of is judged by its nearest kin.
        """
        job = (self.job.stood.sum(1) + UNKNOWN * PRIOR) / (self.job.tried.sum(1) + PRIOR)
        job_rate = (self.job.stood + PRIOR * job[:, None]) / (self.job.tried + PRIOR)
        tried, stood = self.own.tried[slots], self.own.stood[slots]
        own = (stood.sum(2) + PRIOR * job) / (tried.sum(2) + PRIOR)
        kin = np.minimum(1.0, own[..., None] * (job_rate / job[:, None]))
        rate = (stood + PRIOR * kin) / (tried + PRIOR)
        chances: Array = np.cumprod(rate, axis=2)
        return chances

    def shares(self, slots: Indices) -> Array:
        """[N, sources]: how often a round's draft comes from there."""
        job = (self.job.found + PRIOR / len(self.job.found)) / (self.job.found.sum() + PRIOR)
        found = self.own.found[slots]
        shares: Array = ((found + PRIOR * job) / (found.sum(1, keepdims=True) + PRIOR))[:, 1:]
        return shares
