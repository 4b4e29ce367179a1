"""What a finished continuation says of itself: its text, what stopped it, whose it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from runtime.events import Finished, NoMoreRequests, Submit
from runtime.verify import Decision
from tests.events import END, decided, ints, ready, reports, request, tell, text_of

REASONS: dict[str, tuple[dict[str, Any], str, str | int | None]] = {
    "the model's own end": ({}, "ef", None),
    "its own end among the stop tokens": ({"stop_token_ids": (END,)}, "ef", None),
    "its own end ignored, and a stop token": ({"ignore_eos": True, "stop_token_ids": (END,)}, "ef", END),
    "its own end shown": ({"include_stop_str_in_output": True}, "efz", None),
    "a stop token": ({"stop_token_ids": (5,)}, "e", 5),
    "a stop token shown": ({"stop_token_ids": (5,), "include_stop_str_in_output": True}, "ef", 5),
    "a stop string": ({"stop": ("x", "f")}, "e", "f"),
    "a stop string shown": ({"stop": ("ef",), "include_stop_str_in_output": True}, "ef", "ef"),
    "a stop string too early": ({"stop": ("e",), "min_tokens": 1}, "ef", None),
    "the length": ({"max_tokens": 2}, "ef", None),
}


@pytest.mark.parametrize("ending", REASONS)
def test_what_stopped_it(ending: str) -> None:
    params, text, reason = REASONS[ending]
    machine = ready()
    machine.handle(Submit(request(**params)))
    done = tell(machine, reports(decided(0, [4, 5, END, 6])))
    [completion] = [action.completion for action in done if isinstance(action, Finished)]
    assert (completion.text, completion.stop_reason) == (text, reason)


def test_special_tokens_show_where_they_are_asked_for() -> None:
    machine = ready(slots=4)
    machine.decode = lambda tokens: text_of([token for token in tokens if token != 5])
    machine.decode_special = text_of
    tell(machine, [Submit(request(0, max_tokens=3)), Submit(request(1, max_tokens=3, skip_special_tokens=False))])
    tell(machine, [Submit(request(2, max_tokens=3, stop=("f",))), NoMoreRequests()])
    done: dict[int, str] = {}
    group = machine._ready[0]
    while machine.stop is None:
        running = list(group.under_way[0].sequences.values())
        ones, slots = ints(*(1 for _ in running)), ints(*(s.slot for s in running))
        each = ints(*(4 + s.num_committed - s.num_prompt for s in running))
        decision = Decision(slots, ints(*(0 for _ in running)), ones, each)
        for action in tell(machine, reports(decision, plan=group.under_way[0].number, last=True)):
            if isinstance(action, Finished):
                done[action.completion.index] = action.completion.text
    assert done == {0: "eg", 1: "efg", 2: "eg"}


def test_copies_are_told_apart_and_end_in_any_order() -> None:
    machine = ready()
    for copy, seed in enumerate((7, 8, 9)):
        plain = request(5, max_tokens=2 - (copy == 2), seed=seed)
        machine.handle(Submit(dataclasses.replace(plain, copy=copy)))
    machine.handle(NoMoreRequests())
    group = machine._ready[0]
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for _ in range(9):
        if machine.stop is not None:
            break
        plan = group.under_way[0]
        running = [s for s in plan.sequences.values() if s.finish_reason is None]
        decision = Decision(
            ints(*(s.slot for s in running)), ints(*(0 for _ in running)), ints(*(1 for _ in running)),
            ints(*(s.sampling.seed + 1 for s in running)),
        )  # fmt: skip
        for action in tell(machine, reports(decision, plan=plan.number, last=True)):
            if isinstance(action, Finished):
                found.append((action.completion.index, action.completion.copy, action.completion.tokens))
    assert machine.stop is not None and machine.stop.code == 0
    assert sorted(found) == [(5, 0, (8, 8)), (5, 1, (9, 9)), (5, 2, (10,))]
