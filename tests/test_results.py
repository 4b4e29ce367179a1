"""Result rows: their shape, and that nothing in them depends on the run but what says so."""

import dataclasses
import json
import random
from typing import Any

import pytest

from launcher.batch import Call, parse
from launcher.results import error_row, metrics, row, stable
from runtime.request import Completion, SpeculationStats


def make_call(chat: bool, index: int = 12) -> Call:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    url = "/v1/chat/completions" if chat else "/v1/completions"
    return parse(index, json.dumps({"custom_id": "mine", "method": "POST", "url": url, "body": body}).encode())


def make_completion(drafts: list[tuple[int, int]], index: int = 12) -> Completion:
    stats = SpeculationStats()
    for drafted, accepted in drafts:
        stats.count(drafted, accepted)
    return Completion(index, 7, (1, 2, 3), "the text", "stop", stats)


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_in_full(chat: bool) -> None:
    made = row(make_call(chat), make_completion([(4, 2), (4, 4), (0, 0)]), "model", 1234)
    body = made["response"].pop("body")
    assert made == {
        "id": "quasar-00000012",
        "custom_id": "mine",
        "response": {"status_code": 200, "request_id": "req-00000012"},
        "error": None,
    }
    text = {"message": {"role": "assistant", "content": "the text"}} if chat else {"text": "the text"}
    assert body == {
        "id": "chatcmpl-00000012" if chat else "cmpl-00000012",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1234,
        "model": "model",
        "choices": [{"index": 0, **text, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        "metrics": {
            "speculative_decoding": {
                "mean_acceptance_length": 3.0,
                "draft_acceptance_rate": 0.75,
                "acceptance_histogram": [1, 0, 1, 0, 1],
                "num_spec_steps": 3,
                "num_accepted_draft_tokens": 6,
                "num_draft_tokens": 8,
            }
        },
    }


def test_an_error_in_full() -> None:
    made = error_row(123456789, None, "invalid_value", "temperature: no")
    error = {"code": "invalid_value", "message": "temperature: no"}
    assert made == {"id": "quasar-123456789", "custom_id": None, "response": None, "error": error}
    assert stable(made) == made


@pytest.mark.parametrize("chat", [False, True])
def test_runs_differ_in_nothing_but_time_and_metrics(chat: bool, seed: int) -> None:
    draw = random.Random(seed)
    runs = []
    for _ in range(5):
        drafts = [(k := draw.randrange(6), draw.randrange(k + 1)) for _ in range(draw.randrange(9))]
        made = row(make_call(chat), make_completion(drafts), "model", draw.randrange(2**31))
        before = json.dumps(made)
        runs.append(json.dumps(stable(made)))
        assert json.dumps(made) == before  # the row itself keeps what `stable` leaves out
    assert len(set(runs)) == 1
    other = dataclasses.replace(make_completion([]), text="another text")
    assert json.dumps(stable(row(make_call(chat), other, "model", 0))) != runs[0]


def test_metrics_before_the_first_check() -> None:
    assert metrics(SpeculationStats()) == {
        "mean_acceptance_length": 0.0,
        "draft_acceptance_rate": 0.0,
        "acceptance_histogram": [],
        "num_spec_steps": 0,
        "num_accepted_draft_tokens": 0,
        "num_draft_tokens": 0,
    }
