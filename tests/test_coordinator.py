"""The coordinator's state machine: events in, actions out, no sockets."""

from __future__ import annotations

import dataclasses
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from configs import exits
from runtime.events import Action, Finished, NoMoreRequests, Refused, Send, Silent, Submit
from runtime.messages import Admission, Failure, Farewell, Plan, Stop, Verdict
from runtime.request import Request
from runtime.sequence import Sampling
from runtime.verify import Decision
from tests.events import (
    END,
    VOCAB,
    coordinator,
    decided,
    finished,
    hello,
    ints,
    plans,
    ready,
    reports,
    request,
    tell,
    verdicts,
)

OVER = Stop(0, "every request is finished")


def test_first_plan() -> None:
    machine = ready()
    assert machine.handle(Submit(request(temperature=0.5, seed=9, stop_token_ids=(7,)))) == [
        Send(
            (0, 1),
            Plan(
                number=1, rounds=2, decision=None, release=[],
                admit=[Admission(0, 0, [1, 2, 3], num_prompt=3, limit=13, ends=[7, END], sampling=Sampling(0.5, 9),
                                 premature=[7, END])],
                tables={0: [0, 1, 2]},  # 3 tokens, and 2 rounds of up to 4: 11
                allowances={0: [3]},
            ),
        )
    ]  # fmt: skip


def test_nothing_is_wanted_before_every_group_is_there() -> None:
    machine = coordinator([(0, 1), (2, 3)])
    for rank in (3, 0, 1):
        assert machine.appetite == 0
        assert machine.handle(hello(rank, rank // 2)) == []
    assert machine.appetite == 0
    machine.handle(hello(2, 1))
    assert machine.appetite == 2 * 2 * 4


def test_the_smallest_cache_is_what_counts() -> None:
    """A request that only some groups could hold would be lost in the others, whichever comes first."""
    for order in ((0, 1), (1, 0)):
        machine = coordinator([(0,), (1,)])
        tell(machine, [hello(g, g, num_blocks=(40, 3)[g]) for g in order])
        assert machine.handle(Submit(request(max_tokens=10)))  # 12 cells
        assert [type(a) for a in machine.handle(Submit(request(1, max_tokens=11)))] == [Refused]


def test_no_requests_at_all() -> None:
    machine = ready()
    assert machine.handle(NoMoreRequests()) == [Send((0, 1), OVER)]
    early = coordinator()
    assert tell(early, [NoMoreRequests(), hello(1)]) == []
    assert early.handle(hello(0)) == [Send((0, 1), OVER)]


def test_the_end_comes_once_and_waits_for_plans_under_way() -> None:
    machine = ready()
    tell(machine, [Submit(request(max_tokens=1)), NoMoreRequests()])
    first = tell(machine, reports(decided(0, [5])))
    assert finished(first) == [((5,), "f", "length")] and len(first) == 1
    nothing = Decision(ints(), ints(), ints(), ints())
    assert tell(machine, reports(nothing, last=True)) == [Send((0, 1), OVER)]
    late = [*reports(nothing), Silent(0, 9.0), Failure(1, 6, "late"), NoMoreRequests(), hello(0)]
    assert tell(machine, late) == []
    assert machine.stop == OVER and not machine.over
    tell(machine, [Farewell(0, 2, {}, 1), Farewell(1, 2, {}, 1)])
    assert machine.over


def test_reports_in_any_order_between_ranks() -> None:
    rounds = [reports(decided(0, [4, 5])), reports(decided(0, [6]), last=True)]
    by_rank = [[one[rank] for one in rounds] for rank in (0, 1)]
    orders = set(permutations([0, 0, 1, 1]))
    assert len(orders) == 6
    for order in orders:
        machine = ready()
        machine.handle(Submit(request(max_tokens=3)))
        queues = [list(queue) for queue in by_rank]
        done = tell(machine, [queues[rank].pop(0) for rank in order])
        assert finished(done) == [((4, 5, 6), "efg", "length")]


WRONG = {
    "another decision": lambda r: dataclasses.replace(r, digest=b"8 bytes."),
    "another plan": lambda r: dataclasses.replace(r, plan=2),
    "another end of the plan": lambda r: dataclasses.replace(r, last=True),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_disagreement_stops_every_rank(wrong: str) -> None:
    machine = ready(groups=[(0, 1), (2,)])
    machine.handle(Submit(request()))
    first, second = reports(decided(0, [4]))
    assert machine.handle(first) == []
    [stop] = machine.handle(WRONG[wrong](second))
    assert isinstance(stop, Send) and stop.ranks == (0, 1, 2)
    assert isinstance(stop.message, Stop) and stop.message.code == exits.DISAGREED
    assert machine.handle(Submit(request(1))) == []


STRANGE = {
    "a rank of no group": [hello(7)],
    "hello twice": [hello(0), hello(0)],
    "another model": [hello(0), hello(1, digest="other")],
    "a member of another group": [hello(0, group=1)],
    "a report before hello": [reports(decided(0, [4]))[0]],
    "a verdict before hello": [Verdict(0, 1, ints(), ints(), ints(), ints(), np.zeros(0, np.float32), ints())],
    "a report for no plan": [hello(0), hello(1), *reports(decided(0, [4]))],
}


@pytest.mark.parametrize("strange", STRANGE)
def test_strangers_and_impostors(strange: str) -> None:
    machine = coordinator([(0, 1)])
    *_, last = tell(machine, STRANGE[strange])
    assert isinstance(last, Send) and isinstance(last.message, Stop)
    assert (last.ranks, last.message.code) == ((0, 1), exits.DISAGREED)


def test_silence_and_failure() -> None:
    assert ready().handle(Silent(1, 20.4)) == [Send((0, 1), Stop(exits.LOST, "rank 1 has been silent for 20 seconds"))]
    assert ready().handle(Failure(0, 6, "no memory")) == [Send((0, 1), Stop(6, "rank 0 failed: no memory"))]


@pytest.mark.parametrize("first", [0, 1])
def test_merge_at_the_coordinator(first: int) -> None:
    machine = ready(rounds=1, ahead=0)
    assert [plan.number for plan in plans(machine.handle(Submit(request())))] == [1]
    both = verdicts(1, [4, 5, 6], [[(2.0, 4), (1.0, 9), (0.0, 0), (0.0, 0)], [(1.0, 14), (1.0, 12), (0.0, 1), (0.0, 1)]])
    assert machine.handle(both[first]) == []
    [plan] = plans(machine.handle(both[1 - first]))
    assert plan.number == 2 and plan.decision is not None
    assert plan.decision.tokens.tolist() == [4, 9], "the first draft stood, and 9 has the smaller id of equal scores"
    assert machine.stats.drafted == [1, 1, 1] and machine.stats.accepted == [1, 0, 0]


@pytest.mark.parametrize("name", ["slots", "decides", "num_drafts", "drafts", "scores", "ids"])
def test_verdicts_that_do_not_belong_together(name: str) -> None:
    machine = ready(rounds=1, ahead=0)
    machine.handle(Submit(request()))
    one, two = verdicts(1, [4], [[(2.0, 4), (1.0, 9)], [(1.0, 14), (1.0, 12)]])
    array = getattr(two, name)
    other = array[:-1] if name in ("scores", "ids") else array + 1
    [stop] = tell(machine, [one, dataclasses.replace(two, **{name: other})])
    assert isinstance(stop, Send) and isinstance(stop.message, Stop) and stop.message.code == exits.DISAGREED


def test_a_verdict_that_is_not_a_number() -> None:
    machine = ready(rounds=1, ahead=0)
    machine.handle(Submit(request()))
    [stop] = tell(machine, verdicts(1, [], [[(np.nan, 4)], [(1.0, 14)]]))
    assert isinstance(stop, Send) and isinstance(stop.message, Stop) and stop.message.code == exits.DEVICE


ENDINGS: dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], str, str]]] = {
    "end token": ({}, ((4, 5, END), "ef", "stop")),
    "end token ignored": ({"ignore_eos": True, "max_tokens": 5}, ((4, 5, END, 6, 7), "efzgh", "length")),
    "length": ({"max_tokens": 2}, ((4, 5), "ef", "length")),
    "end token as the last that fits": ({"max_tokens": 3}, ((4, 5, END), "ef", "stop")),
    "stop token": ({"stop_token_ids": (5,)}, ((4, 5), "e", "stop")),
    "stop string": ({"stop": ("f",)}, ((4, 5), "e", "stop")),
    "stop string at the start": ({"stop": ("e",)}, ((4,), "", "stop")),
    "stop string over tokens": ({"stop": ("ef",)}, ((4, 5), "", "stop")),
    "stop string as the last that fits": ({"stop": ("f",), "max_tokens": 2}, ((4, 5), "e", "stop")),
    "stop string that the end token would complete": ({"stop": ("fz", "g")}, ((4, 5, END), "ef", "stop")),
    "stop string over an end token ignored": ({"stop": ("fz",), "ignore_eos": True}, ((4, 5, END), "e", "stop")),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("runs", [[4], [1, 3], [2, 2], [3, 1], [1, 1, 1, 1]])
def test_endings_inside_a_run_of_accepted_tokens(ending: str, runs: list[int]) -> None:
    """Tokens after the end are dropped, and it is the same end if they come one by one."""
    params, expected = ENDINGS[ending]
    machine = ready(rounds=len(runs) + 1)
    machine.handle(Submit(request(**params)))
    tokens, done = [4, 5, END, 6], list[Action]()
    for count in runs:
        done += tell(machine, reports(decided(0, tokens[:count])))
        tokens = tokens[count:]
    done += tell(machine, reports(decided(0, [7])))
    assert finished(done) == [expected]


def test_a_slot_that_ended_is_released_with_the_next_plan_and_used_again() -> None:
    machine = ready(slots=1)
    tell(machine, [Submit(request(0, stop=("e",))), Submit(request(1))])
    [plan] = plans(tell(machine, reports(decided(0, [4]))))
    assert (plan.number, plan.release, [a.index for a in plan.admit]) == (2, [0], [1])
    # The ranks know nothing of stop strings: plan 1 still goes on with request 0, and that is not request 1's.
    assert finished(tell(machine, reports(decided(0, [9, 9]), last=True))) == []
    tell(machine, reports(decided(0, [8]), plan=2))
    assert machine._ready[0].running[0].output == [8]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (request(prompt=()), "prompt"),
        (request(max_tokens=0), "asked"),
        (request(prompt=(1,) * 50), "model takes 50"),
        (request(prompt=(1, VOCAB)), "vocabulary"),
        (request(prompt=(-1,)), "vocabulary"),
    ],
)
def test_what_cannot_run_is_refused_and_the_rest_goes_on(bad: Request, word: str) -> None:
    machine = ready()
    [refused] = machine.handle(Submit(bad))
    assert isinstance(refused, Refused) and word in refused.reason
    assert machine.handle(Submit(request(1)))


def test_output_ends_at_the_models_limit() -> None:
    machine = ready()
    [plan] = plans(machine.handle(Submit(request(prompt=(1,) * 49, max_tokens=99))))
    assert plan.admit[0].limit == 50


def test_requests_are_shared_evenly_among_groups() -> None:
    machine = ready(groups=[(0,), (1,), (2,)])
    sent = tell(machine, [Submit(request(index)) for index in range(3)])
    assert [a.ranks for a in sent if isinstance(a, Send)] == [(0,), (1,), (2,)]
    tell(machine, [Submit(request(index)) for index in range(3, 9)])
    for rank in range(3):
        tell(machine, reports(decided(0, [4]), ranks=(rank,)))
    assert [len(group.running) for group in machine._ready.values()] == [3, 3, 3]


def test_groups_do_not_wait_for_each_other() -> None:
    machine = ready(groups=[(0,), (1,)])
    tell(machine, [Submit(request(0, max_tokens=1)), Submit(request(1, max_tokens=1)), NoMoreRequests()])
    assert finished(tell(machine, reports(decided(0, [4]), last=True, ranks=(1,)))) == [((4,), "e", "length")]
    assert machine.stop is None
    assert tell(machine, reports(decided(0, [5]), last=True, ranks=(0,)))[-1] == Send((0, 1), OVER)


def test_a_preempted_sequence_comes_back_with_its_tokens() -> None:
    machine = coordinator([(0,)], rounds=1, ahead=0)
    machine.handle(hello(0, num_blocks=6))  # 24 cells for two sequences that want 15 each
    tell(machine, [Submit(request(0, max_tokens=13)), Submit(request(1, max_tokens=13)), NoMoreRequests()])
    outputs: dict[int, tuple[int, ...]] = {}
    readmitted: list[Admission] = []
    group = machine._ready[0]
    for _ in range(40):
        if machine.stop is not None:
            break
        running = list(group.under_way[0].sequences.values())
        tokens = ints(*(s.index + 4 for s in running))
        slots = ints(*(s.slot for s in running))
        none, ones = np.zeros(len(running), np.int32), np.ones(len(running), np.int32)
        one = Verdict(0, group.under_way[0].number, slots, ones, none, ints(), ones.astype(np.float32), tokens)
        for action in machine.handle(one):
            if isinstance(action, Finished):
                outputs[action.completion.index] = action.completion.tokens
            elif isinstance(action, Send) and isinstance(action.message, Plan):
                readmitted += [a for a in action.message.admit if len(a.tokens) > a.num_prompt]
    assert machine.stop == OVER
    assert outputs == {0: (4,) * 13, 1: (5,) * 13}
    assert [a.index for a in readmitted] == [1] and set(readmitted[0].tokens[3:]) == {5}
    assert group.pool.num_free == 6


def test_those_put_back_go_on_before_those_that_have_not_begun() -> None:
    machine = ready(slots=1)
    tell(machine, [Submit(request(index)) for index in range(4)])
    group = machine._ready[0]
    older, younger = machine._waiting.popleft(), machine._waiting.popleft()
    group.leaving = [(1, younger), (1, older)]  # the youngest is put back first
    machine._plans()
    assert [s.index for s in machine._waiting] == [older.index, younger.index, 3]


def test_a_group_has_no_more_blocks_than_its_smallest_rank() -> None:
    machine = coordinator()
    tell(machine, [hello(0, num_blocks=40), hello(1, num_blocks=3)])
    assert machine._ready[0].pool.size == 3


def test_statistics() -> None:
    machine = ready()
    machine.handle(Submit(request(max_tokens=4)))
    done = tell(machine, [*reports(decided(0, [4, 5, 6], drafts=3)), *reports(decided(0, [7], drafts=0), last=True)])
    [completion] = [action.completion for action in done if isinstance(action, Finished)]
    for stats in (completion.stats, machine.stats):
        assert (stats.steps, stats.drafted, stats.accepted, stats.histogram) == (2, [1, 1, 1], [1, 1, 0], [1, 0, 1])
    assert machine.num_rounds == 2
