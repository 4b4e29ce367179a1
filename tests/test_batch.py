"""Batch input: the scan, and every way a line is refused."""

import hashlib
import json
import random
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import batch
from launcher.batch import BadRequest, Call, DuplicateId, InputError, parse, scan
from launcher.body import NEUTRAL, ChatBody, CompletionBody

ROOT = Path(__file__).parent.parent
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ENVELOPE = {"custom_id": "a", "method": "POST", "url": COMPLETIONS}


def line(body: Any, url: str = COMPLETIONS, **envelope: Any) -> bytes:
    return json.dumps({**ENVELOPE, "url": url, "body": body, **envelope}).encode() + b"\n"


def call(body: Any, url: str = COMPLETIONS, **envelope: Any) -> Call:
    return parse(0, line(body, url, **envelope))


def refusal(raw: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(0, raw)
    return caught.value


# The scan


def test_scan_finds_every_request(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "in.jsonl"
    blank = [b"\n", b"  \n", b"\r\n", b"\t\n"]
    lines = [line({"prompt": "ü" * draw.randrange(1, 99)}, custom_id=f"id {i}") for i in range(200)]
    mixed = [piece for text in lines for piece in (*draw.sample(blank, draw.randrange(3)), text)]
    mixed[-1] = mixed[-1].rstrip()  # a file need not end in a newline
    path.write_bytes(b"".join(mixed))
    found = scan(path)
    assert len(found) == 200 and found.num_lines == len(mixed)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    order = draw.sample(range(200), 50)
    for index, raw in found.lines(order):
        assert parse(index, raw).custom_id == f"id {index}" and raw.rstrip() == lines[index].rstrip()


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_input_without_requests(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert len(scan(path)) == 0 and list(scan(path).lines([])) == []


def test_broken_lines_are_requests_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xff\xfe\n{"custom_id": 5}\n{"custom_id": ""}\n{"custom_id": ""}\n[1]\n{"custom_id": "a"\n')
    assert len(scan(path)) == 6


def test_a_duplicate_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n" + b"".join(line({}, custom_id=name) for name in "abcdecf"))
    with pytest.raises(DuplicateId, match=r"'c' stands on line 4 and again on line 7") as caught:
        scan(path)
    assert caught.value.custom_id == "c" and caught.value.lines == (4, 7)


def test_names_with_one_hash_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "hash_of", len)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(line({}, custom_id=name) for name in ("aa", "bb", "c", "dd")))
    assert len(scan(path)) == 4
    path.write_bytes(b"".join(line({}, custom_id=name) for name in ("aa", "bb", "c", "bb")))
    with pytest.raises(DuplicateId, match="'bb' stands on line 2 and again on line 4"):
        scan(path)


def test_a_scan_costs_bytes_a_request(tmp_path: Path) -> None:
    path, requests = tmp_path / "in.jsonl", 50_000
    with path.open("wb") as file:
        file.writelines(b'{"custom_id": "request number %d of a large batch"}\n' % i for i in range(requests))
    tracemalloc.start()
    found = scan(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == requests and peak < 40 * requests


def test_an_input_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line({"prompt": "x"}, custom_id="a") + line({"prompt": "x"}, custom_id="b"))
    lines = scan(path).lines([0, 1])
    next(lines)
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(InputError, match="was changed"):
        next(lines)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: No such file"):
        scan(tmp_path / "nowhere.jsonl")


# Lines


def test_a_whole_body_is_taken() -> None:
    body = {
        "safety_identifier": "h", "prompt_cache_key": "k", "cache_salt": "s",
        "model": "any", "user": "me", "metadata": {"k": [1]}, "prompt": [1, 2], "max_tokens": 5, "temperature": 0,
        "seed": -(2**63), "stop": ["a", "b"], "stop_token_ids": [7], "ignore_eos": True, "stream": False, "n": 3,
        "best_of": 3, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": -2, "frequency_penalty": 2,
        "repetition_penalty": 1.1, "min_tokens": 2, "logit_bias": {"0": -100, "17": 0.5}, "allowed_token_ids": [1, 2],
        "bad_words": ["no"], "logprobs": 0, "prompt_logprobs": 20, "echo": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "response_format": {"type": "text"}, "structured_outputs": None,
    }  # fmt: skip
    taken = call(body).body
    assert isinstance(taken, CompletionBody) and taken.model_dump(exclude={"response_format"}) == {
        name: value for name, value in body.items() if name != "response_format"
    }
    assert set(body) == set(CompletionBody.model_fields), "a parameter that this test doesn't know"
    assert taken.copies == 3 and taken.likeliest == 0
    assert taken.stops == ("a", "b") and taken.limit == 5 and not call(body).chat
    chat = call({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 3}, CHAT)
    assert chat.chat and chat.body.limit == 3


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "seed", "stop", "top_p", "n", "logprobs", "stream"])
def test_null_is_not_given(name: str) -> None:
    assert call({"prompt": "x", name: None}) == call({"prompt": "x"})


def test_a_byte_order_mark_is_no_part_of_a_line() -> None:
    assert parse(0, b"\xef\xbb\xbf" + line({"prompt": "x"})) == call({"prompt": "x"})


@pytest.mark.parametrize(
    ("raw", "custom_id", "code", "message"),
    [
        (b"{", None, "invalid_json_line", "not JSON"),
        (b"{} {}", None, "invalid_json_line", "not JSON"),
        (b'{"a": NaN}', None, "invalid_json_line", "not JSON"),
        (b'"\xff"', None, "invalid_json_line", "not JSON"),
        (b'{"custom_id": "\\ud800"}', None, "invalid_json_line", "not JSON"),
        (b"[" * 100_000, None, "invalid_json_line", "not JSON"),
        (b"[1]", None, "invalid_json_line", "expected a JSON object, got [1]"),
        (b'{"method": "POST"}', None, "missing_required_parameter", "custom_id: needed"),
        (line({}, custom_id=7), None, "invalid_type", "custom_id: expected a string, not empty, got 7"),
        (line({}, custom_id=""), None, "invalid_value", "custom_id: expected a string, not empty"),
        (line({}, method="GET"), "a", "invalid_value", 'method: expected "POST", got "GET"'),
        (line({}, url="/v1/embeddings"), "a", "invalid_value", 'url: expected "/v1/completions" or'),
        (line([]), "a", "invalid_type", "body: expected an object, got []"),
        (line({}, customid="a"), "a", "unknown_parameter", "customid: unknown parameter; did you mean custom_id?"),
    ],
)
def test_a_bad_envelope(raw: bytes, custom_id: str | None, code: str, message: str) -> None:
    bad = refusal(raw)
    assert (bad.custom_id, bad.code) == (custom_id, code) and bad.message.startswith(message), bad.message


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"temperatur": 1}, "unknown_parameter", "temperatur: unknown parameter; did you mean temperature?"),
        ({"min_token": 1}, "unknown_parameter", "min_token: unknown parameter; did you mean min_tokens?"),
        ({"messages": HELLO}, "unknown_parameter", "messages: unknown parameter"),
        ({"temperature": 2.1}, "invalid_value", "temperature: expected a number from 0 to 2, got 2.1"),
        ({"temperature": -1}, "invalid_value", "temperature: expected a number from 0 to 2, got -1"),
        ({"temperature": True}, "invalid_type", "temperature: expected a number from 0 to 2, got true"),
        ({"temperature": "1"}, "invalid_type", 'temperature: expected a number from 0 to 2, got "1"'),
        ({"max_tokens": -1}, "invalid_value", "max_tokens: expected a whole number from 1 to 2147483647; 0 with echo, got -1"),
        ({"max_tokens": 1.0}, "invalid_type", "max_tokens: expected a whole number"),
        ({"seed": 2**63}, "invalid_value", "seed: expected a whole number from -2^63 to 2^63 - 1"),
        ({"stop": ""}, "invalid_value", "stop: expected a string or a list of up to 16 strings, none empty"),
        ({"stop": ["a", ""]}, "invalid_value", "stop: expected"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop: expected"),
        ({"stop_token_ids": [1, -1]}, "invalid_value", "stop_token_ids[1]: expected an element of a list of token ids"),
        ({"ignore_eos": 1}, "invalid_type", "ignore_eos: expected true or false, got 1"),
        ({"stream": True}, "invalid_value", "stream: expected false"),
        ({"metadata": []}, "invalid_type", "metadata: expected an object"),
        ({"prompt": ""}, "invalid_value", "prompt: expected a string or a list of token ids, not empty"),
        ({"prompt": []}, "invalid_value", "prompt: expected"),
        ({"prompt": ["x", "y"]}, "invalid_value", "prompt: expected"),
        ({"prompt": [[1], [2]]}, "invalid_value", "prompt: expected"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens: 0 is supported with echo: true only"),
        ({"prompt": None}, "invalid_type", "prompt: expected"),
        ({"n": 0}, "invalid_value", "n: expected a whole number from 1 to 128, got 0"),
        ({"n": 129}, "invalid_value", "n: expected a whole number from 1 to 128, got 129"),
        ({"n": True}, "invalid_type", "n: expected a whole number from 1 to 128, got true"),
        ({"n": 2, "best_of": 3}, "invalid_value", "best_of: only the value of n, 2, is supported, got 3"),
        ({"best_of": 2}, "invalid_value", "best_of: only the value of n, 1, is supported, got 2"),
        ({"top_p": 0}, "invalid_value", "top_p: expected a number above 0, up to 1, got 0"),
        ({"top_p": 1.01}, "invalid_value", "top_p: expected a number above 0, up to 1, got 1.01"),
        ({"top_k": -2}, "invalid_value", "top_k: expected a whole number from 1 on, or 0 or -1 for no limit, got -2"),
        ({"top_k": 1.5}, "invalid_type", "top_k: expected a whole number"),
        ({"min_p": -0.1}, "invalid_value", "min_p: expected a number from 0 to 1, got -0.1"),
        ({"presence_penalty": 2.5}, "invalid_value", "presence_penalty: expected a number from -2 to 2, got 2.5"),
        ({"frequency_penalty": -2.5}, "invalid_value", "frequency_penalty: expected a number from -2 to 2, got -2.5"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty: expected a number above 0, up to 10, got 0"),
        ({"min_tokens": -1}, "invalid_value", "min_tokens: expected a whole number from 0 to max_tokens, got -1"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias: expected an object of token ids, as strings, with "
         "numbers from -100 to 100, got 101"),
        ({"logit_bias": {"x": 1}}, "invalid_value", 'logit_bias: expected an object of token ids, as strings, with numbers '
         'from -100 to 100, got "x"'),
        ({"logit_bias": {"01": 1}}, "invalid_value", "logit_bias: expected"),
        ({"logit_bias": {"9" * 5000: 1}}, "invalid_value", "logit_bias: expected"),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias: expected"),
        ({"allowed_token_ids": []}, "invalid_value", "allowed_token_ids: expected a list of token ids, not empty, got []"),
        ({"bad_words": ["a", ""]}, "invalid_value", "bad_words[1]: expected an element of a list of strings, none empty"),
        ({"logprobs": 21}, "invalid_value", "logprobs: expected a whole number from 0 to 20, got 21"),
        ({"logprobs": True}, "invalid_type", "logprobs: expected a whole number from 0 to 20, got true"),
        ({"prompt_logprobs": -1}, "invalid_value", "prompt_logprobs: expected a whole number from 0 to 20, got -1"),
        ({"skip_special_tokens": 0}, "invalid_type", "skip_special_tokens: expected true or false, got 0"),
        ({"seed": 0.5, "max_tokens": -1}, "invalid_value", "max_tokens: expected a whole number from 1 to 2147483647; 0 with "
         "echo, got -1; seed: expected"),
    ],
)  # fmt: skip
def test_a_bad_parameter(given: dict[str, Any], code: str, message: str) -> None:
    bad = refusal(line({"prompt": "x", **given}))
    assert (bad.custom_id, bad.code) == ("a", code) and bad.message.startswith(message), bad.message


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"logprobs": 1}, "invalid_type", "logprobs: expected true or false, got 1"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs: expected a whole number from 0 to 20"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs: only 0 is supported without logprobs: true, got 2"),
        ({"logprobs": False, "top_logprobs": 2}, "invalid_value", "top_logprobs: only 0"),
        ({"echo": True}, "unsupported_parameter", "echo: only false is supported"),
        ({"best_of": 1}, "unknown_parameter", "best_of: unknown parameter"),
    ],
)
def test_a_bad_parameter_of_a_chat(given: dict[str, Any], code: str, message: str) -> None:
    bad = refusal(line({"messages": HELLO, **given}, CHAT))
    assert (bad.custom_id, bad.code) == ("a", code) and bad.message.startswith(message), bad.message


@pytest.mark.parametrize(
    ("given", "likeliest"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20)],
)
def test_how_many_logprobs_a_chat_asks_for(given: dict[str, Any], likeliest: int | None) -> None:
    assert call({"messages": HELLO, **given}, CHAT).body.likeliest == likeliest


@pytest.mark.parametrize(
    ("messages", "code", "message"),
    [
        ([], "invalid_value", "messages: expected a list of {role, content} objects, not empty, got []"),
        ("hello", "invalid_type", "messages: expected"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "invalid_value", "messages[0].tool_calls: expected"),
        ([5], "invalid_type", "messages[0]: expected an element of a list"),
        ([*HELLO, {"role": "user"}], "missing_required_parameter", "messages[1].content: needed, and not given"),
        ([{"role": 1, "content": "x"}], "invalid_type", "messages[0].role: expected a string, not empty, got 1"),
        ([{"role": "user", "content": None}], "invalid_type", "messages[0].content: expected a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "invalid_value", "messages[0].content: expected"),
        ([{"role": "user", "contents": "x", "content": ""}], "unknown_parameter", "messages[0].contents: unknown para"
         "meter; did you mean content?"),
    ],
)  # fmt: skip
def test_bad_messages(messages: Any, code: str, message: str) -> None:
    bad = refusal(line({"messages": messages}, CHAT))
    assert bad.code == code and bad.message.startswith(message), bad.message


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in NEUTRAL.items() for name in names], ids=lambda x: str(x)
)
def test_what_is_not_supported_is_taken_where_it_changes_nothing(kind: type, name: str) -> None:
    body, url = ({"prompt": "x"}, COMPLETIONS) if kind is CompletionBody else ({"messages": HELLO}, CHAT)
    for neutral in NEUTRAL[kind][name]:  # type: ignore[index]
        assert call({**body, name: neutral}, url) == call(body, url)
    bad = refusal(line({**body, name: "something else"}, url))
    assert bad.code == "unsupported_parameter" and bad.message.startswith(f"{name}: ")
    assert name not in kind.model_fields  # type: ignore[attr-defined]


def test_the_readme_has_every_parameter_with_its_range() -> None:
    rows = [line.split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    envelope = {"model", "user", "metadata", "stream", "prompt", "messages"}
    envelope |= {"safety_identifier", "prompt_cache_key", "cache_salt"}
    for kind in (CompletionBody, ChatBody):
        for name in kind.model_fields.keys() - envelope:
            ranges = [row[1] for row in rows if f"`{name}`" in row[0]]
            assert kind.model_fields[name].description in ranges, name


NAMES = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *(n for k in NEUTRAL.values() for n in k)})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text(max_size=9)
    | st.integers(0, 4000).map(lambda digits: 10**digits) | st.sampled_from([*NAMES, "text", "user"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["role", "content", "name", "type", "text"]) | st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), VALUES, max_size=5),
    st.sampled_from([COMPLETIONS, CHAT]),
)
def test_no_body_raises_anything_else(body: dict[str, Any], url: str) -> None:
    with suppress(BadRequest):
        call(body, url)


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_no_damaged_line_raises_anything_else(data: st.DataObject) -> None:
    raw = line({"messages": HELLO, "stop": ["a"], "seed": 5}, CHAT)
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 9)))
    damaged = raw[:start] + data.draw(st.binary(max_size=5)) + raw[end:]
    with suppress(BadRequest):
        parse(0, damaged)


def test_the_file_layer_imports_neither_torch_nor_transformers() -> None:
    modules = ("answers", "atomic", "batch", "body", "call", "defaults", "encoder", "journal", "logprobs", "progress")
    modules += ("results", "summary", "vocabulary")
    script = f"import sys, {', '.join('launcher.' + name for name in modules)}\n"
    script += "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
