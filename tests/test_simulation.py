"""Whole jobs without tensors: random leases, merges, caches, groups and interleavings; every request gets its own tokens."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import pytest

from runtime.coordinator import Coordinator
from runtime.costs import Costs
from runtime.events import Finished, NoMoreRequests, Refused, Send, Submit
from runtime.group import Limits
from runtime.messages import Hello, Message, Plan, Stop
from runtime.request import Completion, Request, SamplingParams, TokenLogprob
from runtime.wire import decode, encode
from tests.fake_ranks import VOCAB, FakeGroup, invented_token

JOBS = 400  # per merge


@dataclass(slots=True)
class Job:
    """A random job: its groups, its requests, and the network between ranks and coordinator."""

    rng: random.Random
    merge: str
    machine: Coordinator = field(init=False)
    groups: list[FakeGroup] = field(init=False)
    requests: dict[tuple[int, int], Request] = field(init=False)  # by (index, copy)
    completions: dict[tuple[int, int], Completion] = field(default_factory=dict)
    stops: list[Stop] = field(default_factory=list)
    to_group: dict[int, deque[Plan]] = field(default_factory=dict)
    from_rank: dict[int, deque[Message]] = field(default_factory=dict)  # in order from one rank, in any between ranks

    def __post_init__(self) -> None:
        rng = self.rng
        block_size, width = rng.choice([1, 2, 4, 8]), rng.randint(0, 4)
        budget = rng.choice([width + 1, width + 2, 3 * width + 4, 64])
        lease = rng.choice([1, 1, 2, 3, 5]) if self.merge == "group" else 1
        limits = Limits(rng.randint(1, 5), block_size, width, lease, int(self.merge == "group"), fixed=rng.random() < 0.5)
        lookups = rng.randint(1, 3) if width else 0
        seconds = sorted(rng.random() for _ in range(8))
        costs = None if limits.fixed else Costs([1, 2, 8, 20], [0, 30], [*seconds[::2], *seconds[1::2]])
        prompts = [rng.randint(1, 30) for _ in range(rng.choice([0, 1, 2, 12]))]
        wanted = [rng.randint(1, 25) for _ in prompts]
        longest = max((p + w - 1 for p, w in zip(prompts, wanted, strict=True)), default=1)
        enough = -(-longest // block_size)  # blocks of the longest sequence alone
        target = partial(invented_token, rng.randrange(2**31))
        end = (VOCAB - 1,) if rng.random() < 0.5 else ()
        tensor, count = rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3])
        self.groups = [
            FakeGroup(
                number=g, ranks=tuple(range(g * tensor, (g + 1) * tensor)), merge=self.merge, block_size=block_size,
                num_blocks=enough + rng.choice([0, 0, 1, enough, 5 * enough]), max_num_seqs=limits.max_num_seqs,
                lookups=lookups, costs=costs, budget=budget, target=target, draft_rng=random.Random(rng.random()),
                accuracy=rng.random(),
            )
            for g in range(count)
        ]  # fmt: skip
        self.machine = Coordinator([group.ranks for group in self.groups], limits, text_of)
        self.requests = {}
        for index, (length, most) in enumerate(zip(prompts, wanted, strict=True)):
            prompt = tuple(target(index, -1, position) for position in range(length))
            params = SamplingParams(
                max_tokens=most,
                stop=rng.choice([(), (), ("a",), ("bc", "dda")]),
                stop_token_ids=rng.choice([(), (3,)]),
                ignore_eos=rng.random() < 0.5,
                prompt_logprobs=rng.choice([None, None, 1]),
                logprobs=rng.choice([None, 0]),
            )
            for copy in range(rng.choice([1, 1, 2, 5])):
                self.requests[index, copy] = Request(index, prompt, params, copy)
        self.end = end

    end: tuple[int, ...] = field(default=(), init=False)

    def expected(self, request: Request) -> tuple[tuple[int, ...], str, str]:
        """Tokens, text and reason by the plainest of loops."""
        ends = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else self.end)}
        output: list[int] = []
        for position in range(len(request.prompt), len(request.prompt) + request.params.max_tokens):
            output.append(self.groups[0].target(request.index, request.copy, position))
            if output[-1] in ends:
                return tuple(output), text_of(output[:-1]), "stop"
            text = text_of(output)
            if found := [text.index(stop) for stop in request.params.stop if stop in text]:
                return tuple(output), text[: min(found)], "stop"
        return tuple(output), text_of(output), "length"

    def run(self) -> None:
        """Lets random things happen until nothing can; a bound on their number stands for a deadlock or a livelock."""
        hellos = [hello for group in self.groups for hello in group.hellos(end_tokens=self.end)]
        self.rng.shuffle(hellos)
        events: deque[Hello | Submit | NoMoreRequests] = deque(hellos)
        for hello in hellos:
            self.from_rank[hello.rank] = deque()
        self.to_group = {group.number: deque() for group in self.groups}
        submissions = deque([*map(Submit, self.requests.values()), NoMoreRequests()])
        tokens = sum(len(r.prompt) + r.params.max_tokens for r in self.requests.values())
        bound = 200 + 100 * len(self.from_rank) * (tokens + 10)
        for _ in range(bound):
            choices = [("plan", group) for group in self.to_group if self.to_group[group]]
            choices += [("message", rank) for rank in self.from_rank if self.from_rank[rank]]
            choices += [("event", 0)] if events else []
            choices += [("submit", 0)] if submissions and self.machine.appetite else []
            if not choices:
                return
            kind, who = self.rng.choice(choices)
            if kind == "plan":
                group = self.groups[who]
                for rank, messages in zip(group.ranks, group.carry_out(self.to_group[who].popleft()), strict=True):
                    self.from_rank[rank].extend(messages)
            else:
                event = {"message": self.from_rank.get(who, events), "event": events, "submit": submissions}[kind].popleft()
                self.obey(self.machine.handle(event))
        raise AssertionError(f"not at the end after {bound} steps")

    def obey(self, actions: list) -> None:
        for action in actions:
            assert not isinstance(action, Refused), action
            if isinstance(action, Finished):
                name = action.completion.index, action.completion.copy
                assert name not in self.completions, "finished twice"
                self.completions[name] = action.completion
            elif isinstance(action.message, Stop):
                self.stops.append(action.message)
            else:
                message = decode(encode(action.message))
                assert isinstance(action, Send) and isinstance(message, Plan)
                number = next(g.number for g in self.groups if g.ranks == action.ranks)
                self.to_group[number].append(message)


def text_of(tokens: list[int]) -> str:
    return "".join("abcdefghijklmnop"[token] for token in tokens)


def check_logprobs(request: Request, completion: Completion) -> None:
    """One for each token that was asked about, and of that very position."""
    first = len(request.prompt)
    output = [TokenLogprob(token, -position, ()) for position, token in enumerate(completion.tokens, first)]
    prompt = [TokenLogprob(token, -position, ()) if position else None for position, token in enumerate(request.prompt)]
    assert completion.logprobs == (None if request.params.logprobs is None else tuple(output))
    assert completion.prompt_logprobs == (None if request.params.prompt_logprobs is None else tuple(prompt))


@pytest.mark.parametrize("merge", ["group", "coordinator"])
def test_every_request_finishes_with_its_own_tokens(merge: str, seed: int) -> None:
    preempted = borrowed = varied = 0
    for number in range(JOBS):
        job = Job(random.Random(f"{seed} {number}"), merge)
        print(f"job {number}")  # of a failure: the last one
        job.run()
        assert job.stops == [Stop(0, "every request is finished")]
        for name, request in job.requests.items():
            completion = job.completions[name]
            assert (completion.tokens, completion.text, completion.finish_reason) == job.expected(request)
            assert completion.num_prompt_tokens == len(request.prompt)
            check_logprobs(request, completion)
        for group in job.machine._ready.values():
            assert group.pool.num_free == group.pool.size and not group.kept, "blocks leaked"
            assert sorted(group._free_slots) == list(range(group.limits.max_num_seqs))
        assert job.machine.num_rounds > 0 or not job.requests
        preempted += sum(group.preempted for group in job.groups)
        borrowed += sum(group.borrowed for group in job.groups)
        varied += sum(len(group.allowances) > 1 for group in job.groups)
    assert preempted > 0, "no job was tight enough to put a sequence back"
    assert borrowed > 0, "no copy was spared its prompt"
    assert varied > 0, "every sequence had one and the same number of drafts"
