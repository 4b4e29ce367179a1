"""Result rows: their shape, and that nothing in them depends on the run but what says so."""

import dataclasses
import json
import random
from typing import Any

import pytest

from launcher.answers import Answers
from launcher.batch import Call, parse
from launcher.body import CompletionBody
from launcher.results import Writer, error_row, metrics, stable
from launcher.vocabulary import Vocabulary
from runtime.request import Completion, Request, SamplingParams, SpeculationStats, TokenLogprob

PROMPT = (4, 5, 6, 7, 8, 9, 10)


class Letters:
    """A tokenizer of the alphabet; token 27 is special, 28 the first two bytes of a character of three, 29 its last."""

    def decode(self, tokens: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        raw = {27: b"" if skip_special_tokens else b"<end>", 28: "→".encode()[:2], 29: "→".encode()[2:]}
        return b"".join(raw.get(token, bytes([96 + token])) for token in tokens).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return {27: "<end>", 28: "âĨ", 29: "Ĵ"}.get(token, chr(96 + token))


def row(call: Call, completion: Completion | list[Completion], model: str, created: int) -> dict[str, Any]:
    several = completion if isinstance(completion, list) else [completion]
    return Writer(model, "fp_0", Vocabulary(Letters())).row(call, PROMPT, several, created)


def make_call(chat: bool, index: int = 12, **params: Any) -> Call:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body |= params
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
        "system_fingerprint": "fp_0",
        "choices": [{"index": 0, **text, "finish_reason": "stop", "logprobs": None, "stop_reason": None}],
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


def finished(tokens: tuple[int, ...], text: str, logprobs: int | None = 2, **changes: Any) -> Completion:
    """With made-up log-probabilities: -1 for what came, then one less for each letter from `a` on."""
    entries = tuple(TokenLogprob(t, -1.0, tuple((1 + i, -2.0 - i) for i in range(logprobs or 0))) for t in tokens)
    base = Completion(12, 7, tokens, text, "length", SpeculationStats(), logprobs=None if logprobs is None else entries)
    return dataclasses.replace(base, **changes)


def choice(call: Call, completion: Completion) -> dict[str, Any]:
    made = row(call, completion, "model", 0)
    json.dumps(made, allow_nan=False)
    [only] = made["response"]["body"]["choices"]
    return dict(only)


def test_logprobs_of_a_completion() -> None:
    found = choice(make_call(False, logprobs=2), finished((3, 27, 28, 29, 1), "c→a"))
    arrow = "bytes:\\xe2\\x86"
    assert found["logprobs"] == {
        "tokens": ["c", "<end>", arrow, "bytes:\\x92", "a"],
        "token_logprobs": [-1.0] * 5,
        "top_logprobs": [
            {"c": -1.0, "a": -2.0, "b": -3.0},
            {"<end>": -1.0, "a": -2.0, "b": -3.0},
            {arrow: -1.0, "a": -2.0, "b": -3.0},
            {"bytes:\\x92": -1.0, "a": -2.0, "b": -3.0},
            {"a": -1.0, "b": -3.0},
        ],
        "text_offset": [0, 1, 1, 1, 2],
    }


def test_offsets_stay_within_a_text_that_was_cut_at_a_stop() -> None:
    found = choice(make_call(False, logprobs=0), finished((1, 2, 3, 4), "ab", 0))
    assert found["logprobs"]["text_offset"] == [0, 1, 2, 2] and found["logprobs"]["top_logprobs"][0] == {"a": -1.0}


def test_logprobs_of_a_chat() -> None:
    found = choice(make_call(True, logprobs=True, top_logprobs=1), finished((28, 29), "→", 1))
    a = {"token": "a", "logprob": -2.0, "bytes": [97]}
    assert found["logprobs"] == {
        "content": [
            {"token": "\ufffd", "logprob": -1.0, "bytes": [0xE2, 0x86], "top_logprobs": [a]},
            {"token": "\ufffd", "logprob": -1.0, "bytes": [0x92], "top_logprobs": [a]},
        ]
    }
    assert bytes(byte for entry in found["logprobs"]["content"] for byte in entry["bytes"]).decode() == "→"


def test_what_is_ruled_out_has_a_number_all_the_same() -> None:
    entry = TokenLogprob(1, float("-inf"), ((2, float("-inf")),))
    for chat, params in ((False, {"logprobs": 1}), (True, {"logprobs": True, "top_logprobs": 1})):
        found = choice(make_call(chat, **params), dataclasses.replace(finished((1,), "a"), logprobs=(entry,)))
        assert "-9999.0" in json.dumps(found)


BEFORE = (None, *(TokenLogprob(token, -5.0, ((1, -0.5), (2, -6.0))) for token in PROMPT[1:]))


@pytest.mark.parametrize("prompt", ["defghij", list(PROMPT)])
def test_echo_puts_the_prompt_in_front(prompt: Any) -> None:
    plain = choice(make_call(False, prompt=prompt, echo=True), finished((1, 2), "ab", None))
    assert plain["text"] == "defghijab" and plain["logprobs"] is None and "prompt_logprobs" not in plain
    completion = finished((1, 2), "ab", 1, prompt_logprobs=BEFORE)
    both = choice(make_call(False, prompt=prompt, echo=True, logprobs=1), completion)
    found = both["logprobs"]
    assert found["tokens"] == list("defghijab") and found["text_offset"] == list(range(9))
    assert found["token_logprobs"] == [None, *[-5.0] * 6, -1.0, -1.0]
    assert found["top_logprobs"][:2] == [None, {"e": -5.0, "a": -0.5}], "as many of the prompt as of the output"
    assert "prompt_logprobs" not in both


@pytest.mark.parametrize("chat", [False, True])
def test_logprobs_of_the_prompt(chat: bool) -> None:
    call = make_call(chat, prompt_logprobs=2, n=2)
    several = [finished((1,), "a", None, prompt_logprobs=BEFORE), finished((1,), "a", None, copy=1)]
    body = row(call, several, "model", 0)["response"]["body"]
    for place in [body] if chat else body["choices"]:
        assert len(place["prompt_logprobs"]) == 7 and place["prompt_logprobs"][0] is None
        assert place["prompt_logprobs"][1] == {
            "5": {"logprob": -5.0, "rank": None, "decoded_token": "e"},
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "2": {"logprob": -6.0, "rank": 2, "decoded_token": "b"},
        }


def test_several_choices_and_what_they_add_up_to() -> None:
    first, second = make_completion([(4, 2)]), make_completion([(4, 4)])
    several = [first, dataclasses.replace(second, copy=1, text="other", stop_reason="x", finish_reason="stop")]
    body = row(make_call(True, n=2), several, "model", 0)["response"]["body"]
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert [c["message"]["content"] for c in body["choices"]] == ["the text", "other"]
    assert [c["stop_reason"] for c in body["choices"]] == [None, "x"]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert body["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] == 6
    assert first.stats.num_accepted == 2, "a row changes nothing"


def test_continuations_may_end_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    answers = Answers()
    counts = {index: draw.randint(1, 6) for index in range(20)}
    for index, count in counts.items():
        answers.expect(make_call(False, index, n=count), Request(index, PROMPT, SamplingParams()))
    coming = [(index, copy) for index, count in counts.items() for copy in range(count)]
    draw.shuffle(coming)
    done = {}
    for index, copy in coming:
        answer = answers.take(dataclasses.replace(make_completion([], index), copy=copy))
        if answer is not None:
            done[index] = [completion.copy for completion in answer.whole]
    assert done == {index: list(range(count)) for index, count in counts.items()} and not len(answers)


def test_a_refusal_counts_once_and_a_copy_too() -> None:
    answers = Answers()
    call = make_call(False, 3, n=2)
    answers.expect(call, Request(3, PROMPT, SamplingParams()))
    answers.take(make_completion([], 3))
    with pytest.raises(ValueError, match="twice"):
        answers.take(make_completion([], 3))
    assert answers.refuse(3) == call and answers.refuse(3) is None and not len(answers)


def test_a_prompt_alone_is_scored() -> None:
    """`max_tokens` 0 with `echo`: the token that was made to get there doesn't show."""
    entries = (TokenLogprob(1, -1.0, ((1, -1.0),)), TokenLogprob(2, -2.0, ((1, -1.0),)), TokenLogprob(27, 0.0, ()))
    prompt = (None, *(TokenLogprob(token, -0.5, ((token, -0.5),)) for token in PROMPT[1:]))
    completion = dataclasses.replace(make_completion([(0, 0)]), logprobs=entries, prompt_logprobs=prompt)
    call = make_call(False, prompt=[list(PROMPT)], echo=True, max_tokens=0, logprobs=1)
    assert isinstance(call.body, CompletionBody) and call.body.limit == 1
    body = row(call, completion, "m", 0)["response"]["body"]
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("defghij", "length", None)
    assert choice["logprobs"]["tokens"] == list("defghij") and choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * 6
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
