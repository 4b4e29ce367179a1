"""What the coordinator and the ranks say to each other: frozen dataclasses, written and read by `runtime/wire.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from runtime.costs import Costs, Effort
from runtime.logprobs import Logprobs
from runtime.request import SpeculationStats
from runtime.sequence import Sampling
from runtime.verify import Decision, Floats, Ints


@dataclass(frozen=True, slots=True)
class Hello:
    """Rank -> coordinator, once its model is loaded.

    `digest` covers all settings, `fingerprint` only what decides which tokens come. `num_blocks` is what its KV cache holds.
    `lookups` counts the sources of drafts that find something now and then, `chains` says whether one more always does;
    `costs` is what rounds took, where numbers of drafts are to be chosen; `even` says that rounds are as wide as their longest
    draft.
    """

    rank: int
    group: int
    digest: str
    num_blocks: int
    max_model_len: int
    vocab_size: int
    end_tokens: list[int]
    fingerprint: str = ""
    lookups: int = 0
    chains: bool = False
    even: bool = False
    costs: Costs | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence to take up: the fields of `runtime.sequence.Sequence`, its tokens so far included.

    `num_computed` is more than 0 where its first blocks are shared with another copy, which has computed them.
    """

    index: int
    slot: int
    tokens: list[int]
    num_prompt: int
    limit: int
    ends: list[int]
    sampling: Sampling
    copy: int = 0
    num_computed: int = 0
    premature: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """Coordinator -> every rank of a group: what changes, then `rounds` rounds to run.

    Applied in this order: `decision` (the last round's, under merge: coordinator), `release` (slots), `admit`,
    `tables` (slot -> all of its blocks, for the slots whose blocks changed), `allowances` (slot -> the most drafts by source,
    likewise), which hold for all rounds of the plan.
    """

    number: int
    rounds: int
    decision: Decision | None
    release: list[int]
    admit: list[Admission]
    tables: dict[int, list[int]]
    allowances: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Rank -> coordinator under merge: coordinator: the best of its slice of the vocabulary for every row of a round.

    slots, decides, num_drafts: int32 [S]; drafts: int32 [sum of num_drafts]; scores float32 and ids int32 [R], where a
    sequence that decides has `num_drafts + 1` rows. `logprobs` comes from the group's first rank alone, of all rows that
    ask: those of drafts that will not stand are written over when their position is decided. sources: int32 [S], where the
    drafts came from, 0 for nowhere, -1 where nobody asked.
    """

    rank: int
    plan: int
    slots: Ints
    decides: Ints
    num_drafts: Ints
    drafts: Ints
    scores: Floats
    ids: Ints
    logprobs: Logprobs | None = None
    sources: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Rank -> coordinator under merge: group: what the group decided in a round, or only that it did the same.

    `digest` covers all rounds up to this one. `decision` and `logprobs` (as in a verdict) come from the group's first rank
    alone. `sources` as in a verdict. `last` ends the plan, which may come before its rounds are used up when no
    sequence has work left.
    """

    rank: int
    plan: int
    digest: bytes
    last: bool
    decision: Decision | None
    logprobs: Logprobs | None = None
    sources: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life, either way; `rank` is -1 from the coordinator."""

    rank: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Rank -> coordinator: this rank cannot go on. `code` is the exit code it asks for."""

    rank: int
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Coordinator -> every rank: the job is over, with exit code 0, or must end, with another."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Farewell:
    """Rank -> coordinator, its last message: seconds by part, and peak memory in bytes.

    `inner`: under certification, what speculation did for the int4 model; the group's first rank counts for the group.
    """

    rank: int
    rounds: int
    seconds: dict[str, float]
    peak_memory: int
    inner: SpeculationStats = field(default_factory=SpeculationStats)


Message = Hello | Plan | Verdict | Report | Alive | Failure | Stop | Farewell
