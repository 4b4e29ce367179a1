"""Whole jobs in the test's own process: the real coordinator, ranks and engines, with lists in place of sockets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from unittest import mock

import torch

from configs.load import load
from configs.schema import ModelConfig, RunConfig
from runtime.comm import Communicator, Solo
from runtime.coordinator import Coordinator
from runtime.events import Finished, NoMoreRequests, Refused, Send, Submit
from runtime.group import Limits
from runtime.messages import Hello, Message, Plan, Stop, decode, encode
from runtime.model import Model, load_model
from runtime.request import Completion, Request
from tests.tiny_models import ThreadRank, Threads
from workers.build import Place, build
from workers.rank import Rank
from workers.transport import Client

DEMO = "configs/demo/demo.yaml"


class Mailbox:
    """Stands in for a rank's socket: what it sends is kept as bytes until someone looks."""

    def __init__(self) -> None:
        self.sent: deque[list[bytes]] = deque()

    def send(self, message: Message) -> None:
        self.sent.append(encode(message))


@cache
def load_alone(config: ModelConfig, device: torch.device, *more: Any) -> Model:
    """A model for one rank. Models keep no state between jobs, so tests can share them."""
    return load_model(config, Solo(), device, *more)


def load_once(config: ModelConfig, comm: Communicator, device: torch.device, *more: Any, on_part: object = None) -> Model:
    assert comm.size == 1
    return load_alone(config, device, *more)


def demo_config(*overrides: str) -> RunConfig:
    """The demo's configuration for one rank, in its own process, with a fixed number of drafts."""
    fixed = ["parallel.tensor=1", "engine.threads=1", "engine.device=cpu", "speculation.num_speculative_tokens=5"]
    return load(DEMO, [*fixed, *overrides])


@dataclass(frozen=True, slots=True)
class Outcome:
    """Completions by index, the coordinator as it was at the end, how often a sequence was admitted, and how often
    behind blocks of another copy. `copies` has all completions by (index, copy)."""

    completions: dict[int, Completion]
    machine: Coordinator
    admissions: int
    borrowed: int
    copies: dict[tuple[int, int], Completion]


def start(config: RunConfig, size: int) -> list[tuple[Rank, Mailbox, Hello]]:
    """The ranks of the one group; several are threads when they meet."""
    group = tuple(range(size))
    threads = Threads(size)

    def connect(config: RunConfig, place: Place, device: torch.device) -> Communicator:
        return Solo() if size == 1 else ThreadRank(threads, place.rank)

    def one(number: int) -> tuple[Rank, Mailbox, Hello]:
        engine, hello = build(config, Place(number, 0, [group], number, size, True, "test"))
        mailbox = Mailbox()
        return Rank(number, number == 0, config.coordination.merge, engine, cast(Client, mailbox)), mailbox, hello

    load = load_once if size == 1 else load_model
    with (
        mock.patch("workers.build.connect", connect),
        mock.patch("workers.models.load_model", load),
        ThreadPoolExecutor(size) as pool,  # while they load, ranks try their layers together
    ):
        return list(pool.map(one, group))


def carry_out_together(ranks: list[Rank], plan: Plan) -> None:
    """Every rank carries out the plan, each in a thread of its own; the first error is raised."""
    if len(ranks) == 1:
        ranks[0].carry_out(plan)
        return
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda rank: rank.carry_out(plan), ranks))


def run(config: RunConfig, requests: Iterable[Request], size: int = 1) -> Outcome:
    """Runs a job. `size` ranks make up the one group."""
    started = start(config, size)
    ranks = [rank for rank, _, _ in started]
    machine = Coordinator(
        groups=[tuple(range(size))], limits=Limits.of(config), decode=lambda tokens: " ".join(map(str, tokens))
    )
    completions: dict[tuple[int, int], Completion] = {}
    plans: deque[Plan] = deque()
    admissions = borrowed = 0

    def carry_out(actions: Iterable[Any]) -> None:
        for action in actions:
            assert not isinstance(action, Refused), action
            if isinstance(action, Finished):
                name = action.completion.index, action.completion.copy
                assert name not in completions
                completions[name] = action.completion
            elif isinstance(action, Send) and isinstance(action.message, Plan):
                plans.append(cast(Plan, decode(encode(action.message))))

    for _, _, hello in started:
        carry_out(machine.handle(hello))
    for request in requests:
        carry_out(machine.handle(Submit(request)))
    carry_out(machine.handle(NoMoreRequests()))
    while plans:
        admissions += len(plans[0].admit)
        borrowed += sum(newcomer.num_computed > 0 for newcomer in plans[0].admit)
        carry_out_together(ranks, plans.popleft())
        for _, mailbox, _ in started:
            while mailbox.sent:
                carry_out(machine.handle(cast(Any, decode(mailbox.sent.popleft()))))
    assert machine.stop == Stop(0, "every request is finished"), machine.stop
    firsts = {index: completion for (index, copy), completion in completions.items() if copy == 0}
    return Outcome(firsts, machine, admissions, borrowed, completions)
