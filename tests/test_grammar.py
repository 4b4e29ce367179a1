"""Grammars: masks against enumeration, and whole jobs whose every output follows what was asked for."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from launcher.encoder import copies
from launcher.structure import ResponseFormat, StructuredOutputs, grammar_of, of_choice, of_grammar, of_regex, of_schema
from runtime.grammar import GrammarError, Grammars, Guide
from runtime.request import Request, SamplingParams
from runtime.tokenizer import load_tokenizer
from tests.driver import demo_config, run
from tests.seeds import fresh_seed
from tests.small_words import allowed, random_regex, tokenizer_of

WORDS = ["a", "b", "1", "ab", "ba", "aa", "b1", "1a", "abb", "a1b"]
END = len(WORDS)
DEMO, DEMO_END = "configs/demo/target", 0


def ids(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


def walk(language: set[str], rng: random.Random) -> list[int]:
    """A random output within a language, or a little beyond it."""
    output: list[int] = []
    for _ in range(rng.randint(0, 6)):
        choices = sorted(allowed(language, WORDS, output)) or [0]
        output.append(rng.choice(choices) if rng.random() < 0.9 else rng.randrange(END + 1))
    return output


def test_masks_are_what_enumeration_finds(seed: int) -> None:
    """In any order: a guide goes on, back, aside, and out of its grammar, and answers for the output alone."""
    rng = random.Random(seed)
    grammars = Grammars(lambda: tokenizer_of(WORDS), END + 1, frozenset([END]))
    for _ in range(60):
        regex, language = random_regex(rng)
        if len(language) > 300:
            continue
        assert all(re.fullmatch(regex, text) for text in language), "the reference is right"
        guide = grammars.guide(of_regex(regex))
        for _ in range(25):
            output = walk(language, rng)
            assert ids(guide.mask(output)) == allowed(language, WORDS, output), (regex, output)
            drafts = walk(language, rng)
            stand = 0
            while stand < len(drafts) and drafts[stand] in allowed(language, WORDS, output + drafts[:stand]):
                stand += 1
            assert guide.stand(output, drafts) == stand, (regex, output, drafts)


def test_a_vocabulary_of_sentence_pieces(seed: int) -> None:
    """Spaces that are written as blocks, characters that are spelled in bytes, and ids that only the model has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁yes", "yes", "▁no", "no", "é"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    guide = Grammars(lambda: fast, 400, frozenset([2, 1])).guide(of_choice(["yes no", "é!", "no"]))
    at = {piece: i for i, piece in enumerate(pieces)}

    def names(output: list[str]) -> set[str]:
        return {pieces[i] for i in ids(guide.mask([at[piece] for piece in output]))}

    assert names([]) == {"yes", "no", "é", "<0x79>", "<0x6E>", "<0xC3>"}
    assert names(["<0xC3>"]) == {"<0xA9>"} and names(["<0xC3>", "<0xA9>"]) == names(["é"]) == {"<0x21>"}
    assert names(["yes"]) == {"▁", "▁no", "<0x20>"}
    assert names(["yes", "▁no"]) == {"<s>", "</s>"}, "all of the model's end tokens"


def test_what_cannot_be_a_grammar() -> None:
    words = lambda: tokenizer_of(WORDS)  # noqa: E731
    grammars = Grammars(words, END + 1, frozenset([END]))
    for text, said in [
        (of_regex("a("), "unclosed group"), (of_regex("(?=a)b"), "look-ahead"), (of_grammar("start: x"), 'unknown name: "x"'),
        (of_schema({"type": "objekt"}), "objekt"), (of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (of_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (of_schema({"$ref": "http://127.0.0.1:9/schema"}), "not present"),
    ]:  # fmt: skip
        with pytest.raises(GrammarError, match=said) as caught:
            grammars.guide(text)
        assert "\n" not in str(caught.value) and "%llguidance" not in str(caught.value)
    with pytest.raises(GrammarError, match="no end token"):
        Grammars(words, END + 1, frozenset()).guide(of_regex("a"))
    slow = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(GrammarError, match="tokenizer cannot be guided"):
        Grammars(lambda: slow, 2, frozenset([1])).guide(of_regex("a"))


def test_a_distinct_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    grammars = Grammars(lambda: loads.append(1) or tokenizer_of(WORDS), END + 1, frozenset([END]))
    assert not loads, "nothing is loaded before it is needed"
    texts = [of_regex(regex) for regex in ("a|b", "ab*")]
    made: list[Guide] = [grammars.guide(text) for text in texts * 5]
    assert len(loads) == 1 and grammars._compile.cache_info().misses == 2
    assert ids(made[0].mask([0])) == {END} and ids(made[2].mask([])) == {0, 1}, "guides of one grammar don't share a state"


# Whole jobs


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema all of whose values are short."""
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "integer": lambda: {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 999)},
        "boolean": lambda: {"type": "boolean"},
        "enum": lambda: {"enum": rng.sample(["red", "green", "blue", 1, None, 'a "b"\n'], 3)},
        "string": lambda: {"type": "string", "maxLength": rng.randint(1, 9)},
        "pattern": lambda: {"type": "string", "pattern": "^[a-c]{1,4}-[0-9]+$", "maxLength": 9},
        "either": lambda: {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 9}]},
        "array": lambda: {"type": "array", "items": random_schema(rng, depth - 1), "minItems": 1, "maxItems": 2},
        "object": lambda: {
            "type": "object", "additionalProperties": False, "required": ["key"],
            "properties": {"key": random_schema(rng, depth - 1), "other": random_schema(rng, depth - 1)},
        },
    }  # fmt: skip
    return kinds[rng.choice(list(kinds) if depth else list(kinds)[:-2])]()


Holds = Callable[[str], bool]


def parses_as(schema: dict[str, Any]) -> Holds:
    return lambda text: jsonschema.validate(json.loads(text), schema) is None


@cache
def wishes(seed: int, count: int = 18) -> tuple[tuple[Request, Holds], ...]:
    """Requests of every kind, and what is true of their text once it has come to its end."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer(DEMO)
    made = []
    for index in range(count):
        schema = random_schema(rng)
        asked: list[tuple[str | None, Holds]] = [
            (grammar_of(None, StructuredOutputs.model_validate({"json": schema, "disable_any_whitespace": True})),
             parses_as(schema)),
            (grammar_of(ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"schema": schema}}), None),
             parses_as(schema)),
            (grammar_of(ResponseFormat(type="json_object"), None), parses_as({"type": "object"})),
            (grammar_of(None, StructuredOutputs(regex=r"(def|class) [a-z_]{1,12}\(\)?:\n(    pass/[0-9]{2}\n){1,3}")),
             lambda text: bool(re.fullmatch(r"(def|class) [a-z_]{1,12}\(\)?:\n(    pass/[0-9]{2}\n){1,3}", text))),
            (grammar_of(None, StructuredOutputs(choice=["yes", "no", "nothing at all", "naïve 🙂"])),
             lambda text: text in ("yes", "no", "nothing at all", "naïve 🙂")),
            (grammar_of(None, StructuredOutputs(grammar='root ::= item ("," item)*\nitem ::= [a-z] | "(" root ")"')),
             lambda text: text.count("(") == text.count(")") and not set(text) - set("abcdefghijklmnopqrstuvwxyz(),")),
        ]  # fmt: skip
        grammar, holds = asked[index % len(asked)]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(2**62), max_tokens=80, grammar=grammar,
            top_p=rng.choice([1.0, 0.9]), logprobs=rng.choice([None, 2]), frequency_penalty=rng.choice([0.0, 0.5]),
            presence_penalty=0.5 if index % len(asked) == 5 else 0.0, logit_bias=((DEMO_END, 3.0),),
        )  # fmt: skip
        prompt = tuple(tokenizer(rng.choice(["def f(x):\n", "import json\n\n", "x = {'a': "])).input_ids)
        made.append((Request(index, prompt, params), holds))
    endless = SamplingParams(temperature=1.0, seed=seed, max_tokens=100, grammar=of_regex("[a-z ]{2000}"))
    long = [(Request(count + i, (60 + i, 70, 80), endless), lambda text: False) for i in range(4)]
    return (*long, *made)  # together from the start, these ask for more blocks than a small cache has


JOBS = {
    "none": ["speculation.method=none"],
    "ngram": ["speculation.method=ngram", "engine.max_num_seqs=5"],
    "suffix, coordinator merges": ["speculation.method=suffix", "coordination.merge=coordinator"],
    "model": ["speculation.method=model", "speculation.num_speculative_tokens=4"],
    "model, small cache": ["speculation.method=model", "engine.kv_cache_memory=600KiB", "engine.block_size=8"],
}


ON_RANKS = [("model", 2), ("suffix, coordinator merges", 2), ("ngram", 4)]


@cache
def outcomes(seed: int, name: str, size: int) -> tuple[dict[int, Any], int, int]:
    job = run(demo_config(*JOBS[name]), [request for request, _ in wishes(seed)], size)
    found = {i: (c.tokens, c.finish_reason, c.stop_reason, c.logprobs) for i, c in job.completions.items()}
    return found, job.admissions, sum(c.stats.num_drafted for c in job.completions.values())


@pytest.fixture(scope="module")
def jobs_seed() -> int:
    return fresh_seed()


@pytest.mark.parametrize(("name", "size"), [*((name, 1) for name in JOBS), *ON_RANKS])
def test_every_output_follows_its_grammar(name: str, size: int, jobs_seed: int, one_thread: None) -> None:
    print(f"seed {jobs_seed}")
    tokenizer = load_tokenizer(DEMO)
    found, admissions, drafted = outcomes(jobs_seed, name, size)
    whole = 0
    for request, holds in wishes(jobs_seed):
        tokens, finish_reason, stop_reason, _ = found[request.index]
        assert finish_reason in ("stop", "length") and stop_reason is None
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if finish_reason == "stop":
            assert tokens[-1] == DEMO_END and holds(text), (request.params.grammar, text)
            whole += 1
    assert whole >= len(found) // 3, "many came to an end"
    same = 4 if size == 1 else 3  # a log-probability's last bit may know the number of ranks
    plain = outcomes(jobs_seed, "none", 1)[0]
    assert {i: each[:same] for i, each in found.items()} == {i: each[:same] for i, each in plain.items()}
    assert drafted > 0 or name == "none"
    assert admissions > len(found) or "small" not in name, "the cache was large enough after all"


@pytest.mark.parametrize(("name", "size"), [("model", 1), ("suffix, coordinator merges", 4)])
def test_continuations_are_what_requests_with_their_seeds_are(name: str, size: int, seed: int, one_thread: None) -> None:
    prompt = tuple(load_tokenizer(DEMO)("def f(x):\n" * 8).input_ids)  # of more than one block
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=40, grammar=of_regex("[a-z]{3}( [a-z]{1,9}){1,6}"))
    several = list(copies(Request(0, prompt, params), 4))
    together = run(demo_config(*JOBS[name]), several, size)
    assert together.borrowed > 0, "no copy began behind the prompt of another"
    for request in several:
        alone = run(demo_config(*JOBS["none"]), [replace(request, copy=0)]).completions[0]
        found = together.copies[0, request.copy]
        assert (found.tokens, found.text, found.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
    assert len({completion.tokens for completion in together.copies.values()}) > 1


@pytest.mark.parametrize(("name", "size"), [*((name, 1) for name in JOBS), *ON_RANKS])
def test_where_no_token_is_allowed_the_sequence_ends(name: str, size: int, one_thread: None) -> None:
    ways: list[tuple[dict[str, Any], int | None]] = [  # and how many tokens come, if that is certain
        ({"allowed_token_ids": (70,), "bad_words": ((70,),)}, 0),
        ({"allowed_token_ids": (70,), "bad_words": ((70, 70, 70),), "top_k": 3}, 2),
        ({"allowed_token_ids": (DEMO_END,), "min_tokens": 3, "logprobs": 1}, 0),
        ({"grammar": of_choice(["def"]), "min_tokens": 6, "logprobs": 2, "top_p": 0.9}, None),
        ({"grammar": of_regex("[0-9]+"), "allowed_token_ids": (DEMO_END,)}, 0),
        ({"ignore_eos": True}, None),
    ]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=9, **way) for i, (way, _) in enumerate(ways)]
    job = run(demo_config(*JOBS[name]), [Request(i, (60, 70, 80), p) for i, p in enumerate(params)], size)
    *dead, other = (job.completions[i] for i in range(len(ways)))
    assert other.finish_reason == "length"
    for completion, param, (_, count) in zip(dead, params, ways, strict=False):
        assert (completion.finish_reason, completion.stop_reason) == ("error", "no_token_allowed")
        assert count in (None, len(completion.tokens))
        assert param.logprobs is None or len(completion.logprobs or ()) == len(completion.tokens)
    assert load_tokenizer(DEMO).decode(dead[3].tokens) == "def"
    assert all(group.pool.num_free == group.pool.size for group in job.machine._ready.values())


def test_no_end_comes_too_early() -> None:
    """Before `min_tokens` neither stop tokens nor the model's ends, those that are ignored included."""
    for ignore in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=12, min_tokens=6, ignore_eos=ignore, stop_token_ids=(70,),
            logit_bias=((DEMO_END, 90.0), (70, 80.0)),
        )  # fmt: skip
        tokens = run(demo_config(), [Request(0, (60, 70, 80), params)]).completions[0].tokens
        assert not {DEMO_END, 70} & set(tokens[:6]) and tokens[6] == DEMO_END
        assert len(tokens) == (12 if ignore else 7), "afterwards an ignored one is a token like others"
