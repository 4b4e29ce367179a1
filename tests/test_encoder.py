"""From calls to tokens: special tokens, chat templates, and what only a model can refuse."""

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from launcher.batch import BadRequest, Call, Encoder, parse
from launcher.defaults import Defaults, DefaultsError, read_defaults
from launcher.encoder import copies, copy_seed, seed_of
from launcher.structure import of_choice, of_schema
from runtime.request import Request, SamplingParams
from runtime.tokenizer import TokenizerError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'rogue' %}{{ raise_exception('no rogues') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call(body: Any, url: str = COMPLETIONS, index: int = 0, custom_id: str = "a") -> Call:
    return parse(index, json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_model(directory: Path) -> Path:
    """A byte-level BPE tokenizer that puts <s> before a text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox", "hello world, hello", "what a lovely day"] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return Encoder(model, max_model_len=64, vocab_size=400, job_seed=1, end_tokens=[1])


def test_a_list_of_one_prompt_is_that_prompt(encoder: Encoder) -> None:
    for prompt in ("hello world", [5, 6]):
        assert encoder.encode(call({"prompt": [prompt]})) == encoder.encode(call({"prompt": prompt}))


def test_text_gets_its_special_tokens_and_ids_do_not(encoder: Encoder) -> None:
    request = encoder.encode(call({"prompt": "hello world"}, index=7))
    plain = encoder.tokenizer("hello world", add_special_tokens=False).input_ids
    assert request.index == 7 and request.prompt == (0, *plain) and request.params.max_tokens == 16
    assert encoder.encode(call({"prompt": plain})).prompt == tuple(plain)


def test_chat_goes_through_the_template(encoder: Encoder) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    request = encoder.encode(call({"messages": [{"role": "user", "content": parts}]}, CHAT))
    assert encoder.tokenizer.decode(request.prompt) == "<|user|>hello\nworld<end><|assistant|>"
    assert request.prompt.count(1) == 1  # <end> is one token, and no <s> was added
    assert request.params.max_tokens == 64 - len(request.prompt)


def test_parameters_arrive(encoder: Encoder) -> None:
    given = {"max_tokens": 9, "temperature": 0, "seed": -3, "stop": "z", "stop_token_ids": [5], "ignore_eos": True}
    params = encoder.encode(call({"prompt": "hello", **given})).params
    assert (params.max_tokens, params.temperature, params.seed) == (9, 0.0, -3)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("z",), (5,), True)
    assert encoder.encode(call({"prompt": "hello"})).params.temperature == 1.0


def test_what_is_not_given_changes_nothing(encoder: Encoder) -> None:
    params = encoder.encode(call({"prompt": "hello", "seed": 5})).params
    assert params == SamplingParams(seed=5)


def test_every_parameter_arrives(encoder: Encoder) -> None:
    given = {
        "max_tokens": 9, "min_tokens": 3, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"9": 1, "3": -100}, "prompt_logprobs": 2,
        "structured_outputs": {"choice": ["a", "b"]},
        "allowed_token_ids": [7, 3, 7], "include_stop_str_in_output": True, "skip_special_tokens": False, "seed": 1,
    }  # fmt: skip
    expected = SamplingParams(
        max_tokens=9, min_tokens=3, top_p=0.5, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        grammar=of_choice(["a", "b"]),
        repetition_penalty=1.5, logit_bias=((3, -100.0), (9, 1.0)), prompt_logprobs=2, allowed_token_ids=(3, 7),
        include_stop_str_in_output=True, skip_special_tokens=False, seed=1,
    )  # fmt: skip
    assert encoder.encode(call({"prompt": "hello", **given})).params == expected
    assert encoder.encode(call({"prompt": "hello", "top_k": -1, "seed": 1})).params == SamplingParams(seed=1)


def test_both_ways_to_ask_for_a_structure_are_one(encoder: Encoder) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
    ):
        assert encoder.encode(call({"prompt": "x", **body})).params.grammar == of_schema(schema)
    for body in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert encoder.encode(call({"messages": HELLO, **body}, CHAT)).params.grammar == of_schema({"type": "object"})
    assert encoder.encode(call({"prompt": "x", "response_format": {"type": "text"}})).params.grammar is None


@pytest.mark.parametrize(
    ("body", "url", "logprobs", "prompt_logprobs"),
    [
        ({"prompt": "x", "logprobs": 3}, COMPLETIONS, 3, None),
        ({"prompt": "x", "logprobs": 3, "echo": True}, COMPLETIONS, 3, 3),
        ({"prompt": "x", "logprobs": 3, "echo": True, "prompt_logprobs": 5}, COMPLETIONS, 3, 5),
        ({"prompt": "x", "echo": True}, COMPLETIONS, None, None),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 2}, CHAT, 2, None),
    ],
)
def test_which_logprobs_are_asked_for(
    encoder: Encoder, body: Any, url: str, logprobs: int | None, prompt_logprobs: int | None
) -> None:
    params = encoder.encode(call(body, url)).params
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_bad_words_with_and_without_a_space(encoder: Encoder) -> None:
    def tokens(text: str) -> tuple[int, ...]:
        return tuple(encoder.tokenizer(text, add_special_tokens=False).input_ids)

    assert len(tokens("brown")) == 2 and len(tokens(" brown")) == 1, "as trained"
    assert len(tokens("hello")) == len(tokens(" hello")) == 1 and tokens("hello") != tokens(" hello"), "as trained"
    assert len(tokens(" zq")) == len(tokens("zq")) + 1
    params = encoder.encode(call({"prompt": "x", "bad_words": ["hello", " hello", "brown", "zq"]})).params
    assert params.bad_words == (tokens("hello"), tokens(" hello"), tokens("brown"), tokens("zq"))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, Defaults()),
        ({"eos_token_id": 1}, Defaults()),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}, Defaults(0.6, 0.95, 20)),
        ({"min_p": 0.05, "repetition_penalty": 1.05, "max_new_tokens": 99, "temperature": None},
         Defaults(min_p=0.05, repetition_penalty=1.05, max_tokens=99)),
        ({"top_k": -1}, Defaults()),
    ],
)  # fmt: skip
def test_a_models_own_defaults(file: Any, expected: Defaults, tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert read_defaults(tmp_path, "model") == expected
    assert read_defaults(tmp_path, "openai") == Defaults()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ("[]", "no JSON object"), ('{"top_p": 2}', "top_p: expected a number above 0, up to 1, got 2"),
     ('{"max_new_tokens": 0}', "max_tokens: expected")],
)  # fmt: skip
def test_defaults_that_no_request_could_have(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(DefaultsError, match=r"generation_config\.json.*" + said + r".*sampling\.defaults"):
        read_defaults(tmp_path, "model")


def test_a_request_wins_over_the_defaults(encoder: Encoder) -> None:
    own = Defaults(temperature=0.6, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, max_tokens=20)
    picky = Encoder(encoder.tokenizer, 64, 400, 1, own)
    expected = SamplingParams(
        temperature=0.6, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, max_tokens=20, seed=3
    )
    assert picky.encode(call({"prompt": "x", "seed": 3})).params == expected
    assert picky.encode(call({"messages": HELLO, "seed": 3}, CHAT)).params == expected
    openais = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "max_tokens": 16}
    assert picky.encode(call({"prompt": "x", "seed": 3, **openais})).params == SamplingParams(seed=3)


def test_copies_have_seeds_of_their_own(seed: int) -> None:
    request = Request(4, (1, 2), SamplingParams(seed=seed, prompt_logprobs=1, logprobs=2))
    made = list(copies(request, 128))
    assert made[0] == request and [other.copy for other in made] == list(range(128))
    assert len({other.params.seed for other in made}) == 128
    assert all(-(2**63) <= other.params.seed < 2**63 for other in made)
    assert all(other.params.prompt_logprobs is None and other.params.logprobs == 2 for other in made[1:])
    assert list(copies(request, 3)) == made[:3]
    assert copy_seed(7, 1) == 1084312938917451059  # another formula would finish a half-done job differently


@pytest.mark.parametrize(("length", "asked", "granted"), [(60, 100, 4), (63, 100, 1), (60, 3, 3), (60, None, 4)])
def test_output_is_cut_to_what_fits(encoder: Encoder, length: int, asked: int | None, granted: int) -> None:
    body = {"prompt": [5] * length, "max_tokens": asked}
    assert encoder.encode(call(body)).params.max_tokens == granted


@pytest.mark.parametrize(
    ("body", "url", "code", "message"),
    [
        ({"prompt": [5] * 64}, COMPLETIONS, "context_length_exceeded", "the prompt is 64 tokens; 63 leave room"),
        ({"prompt": "x" * 99}, COMPLETIONS, "context_length_exceeded", "the prompt is 100 tokens"),
        (
            {"prompt": [1, 400]},
            COMPLETIONS,
            "invalid_value",
            "prompt: token id 400 is not in the vocabulary, which ends ",
        ),
        ({"prompt": "x", "stop_token_ids": [400]}, COMPLETIONS, "invalid_value", "stop_token_ids: token id 400"),
        ({"prompt": "x", "logit_bias": {"400": 1}}, COMPLETIONS, "invalid_value", "logit_bias: token id 400 is not in the"),
        ({"prompt": "x", "allowed_token_ids": [400]}, COMPLETIONS, "invalid_value", "allowed_token_ids: token id 400 is"),
        ({"prompt": "x", "min_tokens": 17}, COMPLETIONS, "invalid_value", "min_tokens: expected a whole number from 0 to "
         "max_tokens, which is 16, got 17"),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, COMPLETIONS, "invalid_value", "structured_outputs: at 1(8): "
         'invalid regex "("'),
        ({"prompt": "x", "structured_outputs": {"json": "{"}}, COMPLETIONS, "invalid_value", "structured_outputs: the schema is"
         " not JSON"),
        ({"prompt": "x", "structured_outputs": {"json": "[]"}}, COMPLETIONS, "invalid_value", "structured_outputs: the schema "
         "is not an object"),
        ({"prompt": "x", "structured_outputs": {"grammar": "root ::= ("}}, COMPLETIONS, "invalid_value", "structured_outputs: "
         "the grammar cannot be read"),
        ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}}, CHAT,
         "invalid_value", "response_format: at 1(8): failed to compile JSON schema: Invalid type: thing"),
        ({"prompt": "x", "min_tokens": 3, "max_tokens": 2}, COMPLETIONS, "invalid_value", "min_tokens: expected"),
        ({"prompt": "x", "bad_words": ["a", "  "]}, COMPLETIONS, "invalid_value", 'bad_words: "  " makes no tokens'),
        ({"prompt": "x", "bad_words": ["<end>", "<s>"], "allowed_token_ids": [0, 1]}, COMPLETIONS, "invalid_value",
         "allowed_token_ids: bad_words leave none of them"),
        (
            {"messages": [{"role": "rogue", "content": ""}]},
            CHAT,
            "invalid_value",
            "messages: the chat template says: no",
        ),
    ],
)
def test_what_the_model_cannot_run(encoder: Encoder, body: Any, url: str, code: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        encoder.encode(call(body, url))
    bad = caught.value
    assert (bad.custom_id, bad.code) == ("a", code) and bad.message.startswith(message), bad.message


def test_a_model_without_a_template_cannot_chat(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(BadRequest, match="no chat template") as caught:
        Encoder(tmp_path, 64, 400, 1).encode(call({"messages": HELLO}, CHAT))
    assert caught.value.code == "no_chat_template"


def test_a_seed_is_a_function_of_job_and_name(encoder: Encoder, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"request {draw.random()}" for _ in range(500)]
    seeds = {seed_of(job, name) for name in names for job in (1, 2)}
    assert len(seeds) == 1000 and all(0 <= value < 2**63 for value in seeds)
    again = call({"prompt": "y"}, index=99, custom_id=names[0])
    assert encoder.encode(again).params.seed == seed_of(1, names[0])
    assert Encoder(encoder.tokenizer, 64, 400, 2).encode(again).params.seed == seed_of(2, names[0])
    assert seed_of(0, "a") == 703136084044970374  # another formula would finish a half-done job differently


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a directory"):
        Encoder(tmp_path / "nowhere", 64, 400, 1)
    with pytest.raises(TokenizerError, match="cannot load the tokenizer"):
        Encoder(tmp_path, 64, 400, 1)


IDS = st.lists(st.integers(0, 450), max_size=4)
PARAMS = st.fixed_dictionaries({}, optional={
    "n": st.integers(1, 4), "top_p": st.floats(0.01, 1), "top_k": st.integers(-1, 9), "min_p": st.floats(0, 1),
    "min_tokens": st.integers(0, 40), "max_tokens": st.integers(1, 40), "allowed_token_ids": IDS, "stop_token_ids": IDS,
    "logit_bias": st.dictionaries(st.integers(0, 450).map(str), st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(st.text(max_size=5), max_size=3), "stop": st.lists(st.text(max_size=3), max_size=3),
    "logprobs": st.integers(0, 20), "prompt_logprobs": st.integers(0, 20), "echo": st.booleans(),
})  # fmt: skip


@settings(max_examples=150, deadline=None, database=None)
@given(prompt=st.text(min_size=1, max_size=70), params=PARAMS)
def test_whatever_is_asked_for_is_within_what_the_runtime_takes(prompt: str, params: Any) -> None:
    try:
        request = a_model().encode(call({"prompt": prompt, **params}))
    except BadRequest:
        return
    taken = request.params
    assert 1 <= taken.max_tokens <= 64 - len(request.prompt) and 0 <= taken.min_tokens <= taken.max_tokens
    ids = [*taken.stop_token_ids, *(taken.allowed_token_ids or ()), *(token for token, _ in taken.logit_bias)]
    ids += [token for word in taken.bad_words for token in word]
    assert all(0 <= token < 400 for token in ids)
    assert all(taken.bad_words) and taken.allowed_token_ids != () and taken.top_k >= 0
    if taken.allowed_token_ids is not None:
        assert {(token,) for token in taken.allowed_token_ids} - set(taken.bad_words), "something is left"


@cache
def a_model() -> Encoder:
    with tempfile.TemporaryDirectory() as directory:
        return Encoder(make_model(Path(directory)), max_model_len=64, vocab_size=400, job_seed=1)
