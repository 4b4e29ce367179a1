"""Whole jobs in the test's own process, of one rank or of several that are threads."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from unittest import mock

import torch

from bench.inprocess import Mailbox, drive
from configs.load import load
from configs.schema import ModelConfig, RunConfig
from runtime.comm import Communicator, Solo
from runtime.coordinator import Coordinator
from runtime.group import Limits
from runtime.messages import Hello, Plan
from runtime.model import Model, load_model
from runtime.request import Completion, Request
from tests.tiny_models import ThreadRank, Threads
from workers.build import Place, build
from workers.rank import Rank
from workers.transport import Client

DEMO = "configs/demo/demo.yaml"


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
    members = [(mailbox, hello) for _, mailbox, hello in started]
    course = drive(machine, members, requests, lambda plan: carry_out_together(ranks, plan))
    newcomers = [newcomer for plan in course.plans for newcomer in plan.admit]
    borrowed = sum(newcomer.num_computed > 0 for newcomer in newcomers)
    firsts = {index: completion for (index, copy), completion in course.completions.items() if copy == 0}
    return Outcome(firsts, machine, len(newcomers), borrowed, course.completions)
