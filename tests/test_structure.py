"""Structured output as requests ask for it: what is refused, and what the grammars of each kind stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.call import BadRequest, parse
from launcher.structure import StructuredOutputs, grammar_of
from runtime.grammar import Grammars


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"response_format": {"type": "json"}}, "invalid_value", 'response_format.type: expected "text", "json_object" or '
         '"json_schema", got "json"'),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema: expected with the type"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "invalid_value", "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "missing_required_parameter",
         "response_format.json_schema.schema: needed"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "invalid_type",
         "response_format.json_schema.schema: expected a JSON schema, got [1]"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs: expected one of json, regex, choice, grammar, "
         "json_object, got none"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "invalid_value", "structured_outputs: expected one of"),
        ({"structured_outputs": {"json_object": False}}, "invalid_value", "structured_outputs.json_object: expected true"),
        ({"structured_outputs": {"json": 3}}, "invalid_type", "structured_outputs.json: expected a JSON schema, an object or"),
        ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice: expected a list of strings"),
        ({"structured_outputs": {"regexp": "a"}}, "unknown_parameter", "structured_outputs.regexp: unknown parameter; did you "
         "mean regex?"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "invalid_value",
         "response_format: only text"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "invalid_value", "ignore_eos: only false is supported"),
    ],
)  # fmt: skip
def test_what_is_refused(given: dict[str, Any], code: str, message: str) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", **given}}
    with pytest.raises(BadRequest) as caught:
        parse(0, json.dumps(line).encode())
    assert caught.value.code == code and caught.value.message.startswith(message), caught.value.message


@pytest.fixture(scope="module")
def single_bytes() -> tuple[Grammars, Callable[[str], list[int]]]:
    """Grammars of a vocabulary of single bytes, and what makes a text its tokens, with the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{letter: i for i, letter in enumerate(alphabet)}, "<end>": 256}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return Grammars(lambda: fast, 257, frozenset([256])), lambda text: [*fast(text).input_ids, 256]


NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"choice": ["a\nb", 'q"\\', "naïve 🙂", "/x|y/"]}, ["a\nb", 'q"\\', "naïve 🙂", "/x|y/"], ["a", "x|y", "", "q"]),
        ({"regex": r"\d+/[a-c]{2}|\n"}, ["12/ab", "\n"], ["1/", "a/ab", "\u0661/ab", "12/ab\n"]),
        ({"json": NUMBER}, ['{"a": 1}', '{"a":1}', '{\n  "a": -20\n}'],
         ['{"a": 1', '{"b": 1}', '{"a": 01}', '{"a":' + " " * 400]),
        ({"json": json.dumps(NUMBER), "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json": NUMBER, "whitespace_pattern": "_?"}, ['{"a":_1}'], ['{"a": 1}']),
        ({"json_object": True}, ["{}", '{"x": [1, "é", null, {"y": 1.5e3}]}'], ["[]", "3", "{'x': 1}"]),
        ({"grammar": 'root ::= "(" root ")" | [0-9]+'}, ["1", "((42))"], ["(1", "()"]),
        ({"grammar": 'start: "a" start "b" | NUMBER\nNUMBER: /[0-9]/'}, ["1", "aa3bb"], ["ab", "a1bb"]),
    ],
)  # fmt: skip
def test_what_follows_a_grammar(asked: dict[str, Any], right: list[str], wrong: list[str], single_bytes: Any) -> None:
    grammars, tokens_of = single_bytes
    text = grammar_of(None, StructuredOutputs.model_validate(asked))
    assert text is not None
    guide = grammars.guide(text)
    for words in right:
        tokens = tokens_of(words)
        assert guide.stand([], tokens) == len(tokens), words
    for words in wrong:
        tokens = tokens_of(words)
        assert guide.stand([], tokens) < len(tokens), words
