"""The coordinator's state machine: `handle(event) -> [actions]`, without socket, clock, file or tensor.

It is the one place that decides: it queues requests, makes every group's plans, merges verdicts, commits tokens, and
ends the job. A shell feeds it events in any order in which the network brings them and carries out its actions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from configs import exits
from runtime.acceptance import Acceptance, Counts
from runtime.blocks import BlockPool
from runtime.costs import Effort, RoundCosts, slowest
from runtime.detokenizer import Decode, Stopped, StopWatch
from runtime.events import Action, Event, Finished, NoMoreRequests, Refused, Send, Silent, Submit
from runtime.group import Group, Limits
from runtime.logprobs import Logprobs
from runtime.messages import Failure, Farewell, Hello, Report, Stop, Verdict
from runtime.request import Request, SpeculationStats
from runtime.sequence import Sampling, Sequence
from runtime.track import Track
from runtime.tuner import Tuner
from runtime.verify import Decision, Ints, NotANumber, decide, merge


@dataclass(slots=True)
class Coordinator:
    """All state of a job. `groups` lists the ranks of every group. `decode` turns output tokens into text without special
    tokens, `decode_special` shows these too; without one they are the same."""

    groups: list[tuple[int, ...]]
    limits: Limits
    decode: Decode
    decode_special: Decode | None = None
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    num_rounds: int = 0
    stop: Stop | None = None
    farewells: dict[int, Farewell] = field(default_factory=dict)
    hellos: dict[int, Hello] = field(default_factory=dict)
    _ready: dict[int, Group] = field(default_factory=dict)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _tracks: dict[tuple[int, int], Track] = field(default_factory=dict)
    _closed: bool = False
    _history: Counts | None = None  # of drafts, over all groups

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(rank for group in self.groups for rank in group)

    @property
    def appetite(self) -> int:
        """Requests worth submitting now: enough to fill every slot once more.

        None before every group is there, because only then is it known what the smallest cache can hold.
        """
        if len(self._ready) < len(self.groups) or self._closed or self.stop:
            return 0
        return max(0, 2 * self.limits.max_num_seqs * len(self._ready) - len(self._waiting))

    @property
    def over(self) -> bool:
        """Whether the job has ended and every rank has said goodbye."""
        return self.stop is not None and len(self.farewells) == len(self.ranks)

    def handle(self, event: Event) -> list[Action]:
        """What is to be done about an event. Once the job has ended nothing but farewells matters."""
        if isinstance(event, Farewell):
            self.farewells[event.rank] = event
            return []
        if self.stop is not None:
            return []
        match event:
            case Submit():
                actions = self._submit(event.request)
            case NoMoreRequests():
                self._closed = True
                actions = []
            case Hello():
                actions = self._hello(event)
            case Report() | Verdict() if not any(event.rank in group.ranks for group in self._ready.values()):
                actions = self._end(exits.DISAGREED, f"rank {event.rank} answered before it was asked")
            case Report():
                actions = self._report(event)
            case Verdict():
                actions = self._verdict(event)
            case Failure():
                actions = self._end(event.code or exits.UNFORESEEN, f"rank {event.rank} failed: {event.reason}")
            case Silent():
                actions = self._end(exits.LOST, f"rank {event.rank} has been silent for {event.seconds:.0f} seconds")
        return actions + self._plans()

    def _submit(self, request: Request) -> list[Action]:
        facts = next(iter(self.hellos.values()))
        longest = facts.max_model_len
        limit = min(len(request.prompt) + request.params.max_tokens, longest)
        params = request.params
        if not request.prompt or params.max_tokens < 1:
            return [Refused(request.index, "there is no prompt to continue, or no token is asked for")]
        if len(request.prompt) >= longest:
            return [Refused(request.index, f"the prompt has {len(request.prompt)} tokens, and the model takes {longest}")]
        if not all(0 <= token < facts.vocab_size for token in request.prompt):
            return [Refused(request.index, f"the prompt has a token outside of the vocabulary of {facts.vocab_size}")]
        if not all(group.can_ever_hold(limit) for group in self._ready.values()):
            return [Refused(request.index, f"{limit} tokens do not fit into the KV cache; raise engine.kv_cache_memory")]
        model_ends, stops = frozenset(facts.end_tokens), frozenset(params.stop_token_ids)
        own_ends = frozenset() if params.ignore_eos else model_ends
        sequence = Sequence(
            index=request.index,
            slot=-1,
            tokens=list(request.prompt),
            num_prompt=len(request.prompt),
            limit=limit,
            ends=stops | own_ends,
            premature=stops | model_ends,
            sampling=Sampling.of(params),
            copy=request.copy,
            borrows=params.prompt_logprobs is None,
        )
        self._waiting.append(sequence)
        decode = self.decode if params.skip_special_tokens else self.decode_special or self.decode
        watch = StopWatch(decode, params.stop, params.include_stop_str_in_output, params.min_tokens)
        self._tracks[sequence.name] = Track(request, SpeculationStats(), decode, watch, own_ends)
        return []

    def _hello(self, hello: Hello) -> list[Action]:
        if hello.rank not in self.ranks or hello.rank in self.hellos:
            return self._end(exits.DISAGREED, f"rank {hello.rank} said hello twice or is not of this job")
        first = next(iter(self.hellos.values()), hello)
        if hello.digest != first.digest:
            return self._end(exits.DISAGREED, f"ranks {first.rank} and {hello.rank} loaded different models or settings")
        self.hellos[hello.rank] = hello
        members = next(group for group in self.groups if hello.rank in group)
        if hello.group != self.groups.index(members):
            return self._end(exits.DISAGREED, f"rank {hello.rank} takes itself for a member of group {hello.group}")
        if all(rank in self.hellos for rank in members):
            blocks = min(self.hellos[rank].num_blocks for rank in members)
            tuner = self._tuner([self.hellos[rank] for rank in members])
            sources = hello.lookups + hello.chains
            self._ready[hello.group] = Group(hello.group, members, self.limits, BlockPool(blocks), sources, tuner)
        return []

    def _tuner(self, hellos: list[Hello]) -> Tuner | None:
        """What chooses the numbers of drafts, where there is a choice."""
        first, costs = hellos[0], [hello.costs for hello in hellos if hello.costs is not None]
        if len(costs) < len(hellos) or not first.lookups + first.chains:
            return None
        if self._history is None:
            self._history = Counts((first.lookups + first.chains, self.limits.width))
        acceptance = Acceptance(self.limits.max_num_seqs, self._history)
        fixed = self.limits.width if self.limits.fixed else None
        table = RoundCosts(slowest(costs))
        return Tuner(table, acceptance, self.limits.width, first.lookups, first.chains, first.even, fixed)

    def _group_of(self, rank: int) -> Group:
        return next(group for group in self._ready.values() if rank in group.ranks)

    def _report(self, report: Report) -> list[Action]:
        group = self._group_of(report.rank)
        group.reports[report.rank].append(report)
        if not all(group.reports.values()):
            return []
        heads = [group.reports[rank].popleft() for rank in group.ranks]  # one report makes one round whole at most
        if len({(h.plan, h.digest, h.last) for h in heads}) > 1 or heads[0].decision is None:
            return self._end(exits.DISAGREED, f"the ranks of group {group.number} decided differently: {digests(heads)}")
        first, decision = heads[0], heads[0].decision
        self._learn(group, decision, first.sources, [head.effort for head in heads])
        return self._commit(group, first.plan, decision, first.logprobs, first.last)

    def _verdict(self, verdict: Verdict) -> list[Action]:
        group = self._group_of(verdict.rank)
        group.verdicts[verdict.rank] = verdict
        if len(group.verdicts) < len(group.ranks):
            return []
        verdicts = [group.verdicts.pop(rank) for rank in group.ranks]
        first = verdicts[0]
        if any(same_drafts(v) != same_drafts(first) for v in verdicts):
            return self._end(exits.DISAGREED, f"the ranks of group {group.number} drafted differently")
        try:
            targets = merge(np.stack([v.scores for v in verdicts]), np.stack([v.ids for v in verdicts]))
        except NotANumber as error:
            return self._end(exits.DEVICE, str(error))
        decision = decide(first.slots, first.decides.astype(bool), first.num_drafts, first.drafts, targets)
        group.decision = decision
        self._learn(group, decision, first.sources, [v.effort for v in verdicts])
        return self._commit(group, first.plan, decision, first.logprobs, last=True)

    def _learn(self, group: Group, decision: Decision, sources: Ints, efforts: list[Effort]) -> None:
        """Lets the group's tuner know what became of a round; the slowest rank counts."""
        if group.tuner is None or not group.under_way or len(sources) != len(decision.slots):
            return
        known = {slot: s for slot, s in group.under_way[0].sequences.items() if group.running.get(slot) is s}
        group.tuner.observe(decision, sources, max(efforts, key=lambda effort: effort.seconds), known)

    def _commit(self, group: Group, number: int, decision: Decision, logprobs: Logprobs | None, last: bool) -> list[Action]:
        """Applies a round's decision to the sequences that its plan was made for."""
        plan = group.under_way[0] if group.under_way else None
        if plan is None or plan.number != number:
            return self._end(exits.DISAGREED, f"group {group.number} answered plan {number}, which was not the next")
        plan.rounds_left -= 1
        if last:
            group.under_way.popleft()
        self.num_rounds += len(decision.slots) > 0
        for slot, by_position in {} if logprobs is None else logprobs.by_slot().items():
            track = self._tracks.get(plan.sequences[slot].name)
            if track is not None:
                track.logprobs |= by_position
        actions: list[Action] = []
        offset = 0
        rows = zip(decision.slots.tolist(), decision.num_drafts.tolist(), decision.num_tokens.tolist(), strict=True)
        for slot, num_drafts, num_tokens in rows:
            tokens = decision.tokens[offset : offset + num_tokens].tolist()
            offset += num_tokens
            sequence = plan.sequences[slot]
            if num_tokens and sequence.finish_reason is None:
                actions += self._advance(group, sequence, num_drafts, tokens)
        return actions

    def _advance(self, group: Group, sequence: Sequence, num_drafts: int, tokens: list[int]) -> list[Action]:
        track = self._tracks[sequence.name]
        for stats in (track.stats, self.stats):
            stats.count(num_drafts, len(tokens) - 1)
        stopped: Stopped | None = None
        for token in tokens:
            kept = sequence.commit([token])
            stopped = track.watch.push(token) if kept and token not in sequence.ends else None
            if stopped is not None:
                sequence.finish("stop")
            if sequence.finish_reason is not None:
                break
        if sequence.finish_reason is None:
            return []
        group.retire(sequence, heirs=any(other.index == sequence.index for other in self._waiting))
        del self._tracks[sequence.name]
        return [Finished(track.completion(sequence, stopped))]

    def _plans(self) -> list[Action]:
        """New plans for the groups that can use one, or the end of the job."""
        if self.stop is not None:
            return []
        actions: list[Action] = []
        for group in self._ready.values():
            self._waiting.extendleft(group.returned())  # youngest first, so that the oldest is the first to go on
        unfinished = len(self._waiting) + sum(len(group.running) for group in self._ready.values())
        share = -(-unfinished // max(1, len(self._ready)))
        for group in self._ready.values():
            while (plan := group.plan(self._waiting, share)) is not None:
                actions.append(Send(group.ranks, plan))
        everyone_here = len(self._ready) == len(self.groups)
        if self._closed and everyone_here and not self._waiting and all(g.idle for g in self._ready.values()):
            actions += self._end(0, "every request is finished")
        return actions

    def _end(self, code: int, reason: str) -> list[Action]:
        self.stop = Stop(code, reason)
        return [Send(self.ranks, self.stop)]


def digests(reports: list[Report]) -> str:
    return ", ".join(f"rank {r.rank} plan {r.plan} {r.digest.hex()}" for r in reports)


def same_drafts(verdict: Verdict) -> tuple[int | bytes, ...]:
    """What the verdicts of a group must share."""
    arrays = (verdict.slots, verdict.decides, verdict.num_drafts, verdict.drafts)
    return (verdict.plan, len(verdict.ids), len(verdict.scores), *(array.tobytes() for array in arrays))
