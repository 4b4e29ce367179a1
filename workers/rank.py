"""The life of a rank: load, say hello, carry out plans until the coordinator says stop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime.costs import Effort
from runtime.drafting.cascade import Cascade
from runtime.engine import Engine, Round
from runtime.messages import Admission, Farewell, Plan, Report, Stop, Verdict
from runtime.request import SpeculationStats
from runtime.sequence import Sequence
from workers.memory import peak_memory

if TYPE_CHECKING:  # a rank can be driven without sockets, where there is no ZeroMQ
    from workers.transport import Client


@dataclass(slots=True)
class Rank:
    """Carries out plans on an engine and answers for them.

    leads: whether this rank's reports carry the decisions. merge: "group" decides here, for all rounds of a plan;
    "coordinator" sends a verdict and hears the decision with the next plan.
    """

    rank: int
    leads: bool
    merge: str
    engine: Engine
    client: Client
    _digest: bytes = b""
    _undecided: Round | None = None
    _rounds: int = 0
    _since: float = 0.0  # when the round before ended, or the work came

    def run(self) -> Stop:
        """Works until told to stop, and says farewell. The watchdog bounds the wait for the coordinator."""
        while True:
            with self.engine.clock.part("coordinate"):
                message = self.client.receive(None)
            if isinstance(message, Stop):
                seconds, drafter = dict(self.engine.clock.seconds), self.engine.drafter
                inner = drafter.stats if isinstance(drafter, Cascade) else SpeculationStats()
                self.client.send(Farewell(self.rank, self._rounds, seconds, peak_memory(), inner))
                return message
            if isinstance(message, Plan):
                if message.number == 1:
                    self.engine.clock.seconds.clear()  # waiting for the others to load is no part of any round
                self.carry_out(message)

    def carry_out(self, plan: Plan) -> None:
        """What a plan says, then its rounds."""
        engine = self.engine
        if not engine.sequences:
            self._since = time.perf_counter()
        if plan.decision is not None and self._undecided is not None:
            engine.apply(self._undecided, plan.decision)
        for slot in plan.release:
            engine.release(slot)
        for newcomer in plan.admit:
            engine.admit(admit(newcomer))
        for slot, blocks in plan.tables.items():
            engine.sequences[slot].blocks = blocks
        for slot, allowance in plan.allowances.items():
            engine.sequences[slot].allowance = allowance
        if self.merge == "coordinator":
            self._vote(plan)
        else:
            self._decide(plan)

    def _decide(self, plan: Plan) -> None:
        """Runs the plan's rounds within the group; the coordinator hears of each while the next is under way."""
        drafting = self._drafting
        for outcome in self.engine.rounds(plan.rounds):
            self._digest = outcome.decision.digest(self._digest)
            self._rounds += len(outcome.decision.slots) > 0
            effort, drafting = self._effort(outcome.rows, drafting), self._drafting
            with self.engine.clock.part("coordinate"):
                told, logprobs = (outcome.decision, outcome.logprobs) if self.leads else (None, None)
                answer = Report(
                    self.rank, plan.number, self._digest, outcome.last, told, logprobs, outcome.sources, effort
                )
                self.client.send(answer)

    def _vote(self, plan: Plan) -> None:
        drafting = self._drafting
        round_ = self._undecided = self.engine.draft()
        choice = self.engine.verify(round_)
        self._rounds += len(round_.works) > 0
        verdict = Verdict(
            rank=self.rank,
            plan=plan.number,
            slots=round_.slots,
            decides=round_.decides.astype(np.int32),
            num_drafts=round_.num_drafts,
            drafts=round_.drafts,
            scores=choice.scores,
            ids=choice.ids,
            logprobs=choice.logprobs if self.leads else None,
            sources=round_.sources,
            effort=self._effort(round_.rows, drafting),
        )
        with self.engine.clock.part("coordinate"):
            self.client.send(verdict)


    @property
    def _drafting(self) -> float:
        """Seconds spent drafting so far."""
        return self.engine.clock.seconds.get("draft", 0.0)

    def _effort(self, rows: int, drafting: float) -> Effort:
        """What the round took that ends now. drafting: seconds spent so before it."""
        before, self._since = self._since, time.perf_counter()
        return Effort(self._since - before, self._drafting - drafting, rows)


def admit(newcomer: Admission) -> Sequence:
    """The rank's own copy of a sequence."""
    return Sequence(
        index=newcomer.index,
        slot=newcomer.slot,
        tokens=list(newcomer.tokens),
        num_prompt=newcomer.num_prompt,
        limit=newcomer.limit,
        ends=frozenset(newcomer.ends),
        sampling=newcomer.sampling,
        copy=newcomer.copy,
        num_computed=newcomer.num_computed,
        premature=frozenset(newcomer.premature),
    )
