"""What tests of the coordinator say to it: hellos, requests, reports and verdicts, and how they read its answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from runtime.coordinator import Coordinator
from runtime.events import Action, Finished, Send
from runtime.group import Limits
from runtime.messages import Hello, Plan, Report, Verdict
from runtime.request import Request, SamplingParams
from runtime.verify import Decision

VOCAB, END = 26, 25


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def hello(rank: int, group: int = 0, **changes: Any) -> Hello:
    base = Hello(rank, group, "digest", num_blocks=40, max_model_len=50, vocab_size=VOCAB, end_tokens=[END], lookups=1)
    return dataclasses.replace(base, **changes)


def text_of(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


def coordinator(groups: list[tuple[int, ...]] | None = None, rounds: int = 2, ahead: int = 1, slots: int = 4) -> Coordinator:
    return Coordinator(groups or [(0, 1)], Limits(slots, 4, 3, rounds, ahead), text_of)


def ready(**changes: Any) -> Coordinator:
    """One group of two ranks that have said hello."""
    machine = coordinator(**changes)
    for number, group in enumerate(machine.groups):
        for rank in group:
            assert machine.handle(hello(rank, number)) == []
    return machine


def request(index: int = 0, prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> Request:
    return Request(index, prompt, SamplingParams(**{"max_tokens": 10, **params}))


def decided(slot: int, tokens: list[int], drafts: int | None = None) -> Decision:
    """The decision of a round with one sequence in it."""
    num_drafts = max(0, len(tokens) - 1) if drafts is None else drafts
    return Decision(ints(slot), ints(num_drafts), ints(len(tokens)), ints(*tokens))


def reports(decision: Decision, plan: int = 1, last: bool = False, ranks: tuple[int, ...] = (0, 1)) -> list[Report]:
    return [Report(r, plan, decision.digest(), last, decision if i == 0 else None) for i, r in enumerate(ranks)]


def tell(machine: Coordinator, events: list[Any]) -> list[Action]:
    return [action for event in events for action in machine.handle(event)]


def plans(actions: list[Action]) -> list[Plan]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Plan)]


def finished(actions: list[Action]) -> list[tuple[tuple[int, ...], str, str]]:
    done = [action.completion for action in actions if isinstance(action, Finished)]
    return [(completion.tokens, completion.text, completion.finish_reason) for completion in done]


def verdicts(plan: int, drafts: list[int], best: list[list[tuple[float, int]]]) -> list[Verdict]:
    """Both ranks' verdicts on one sequence that decides."""
    return [
        Verdict(
            rank, plan, ints(0), ints(1), ints(len(drafts)), ints(*drafts),
            np.array([score for score, _ in pairs], np.float32), ints(*(token for _, token in pairs)),
        )
        for rank, pairs in enumerate(best)
    ]  # fmt: skip
