"""Stop strings in text that comes by tokens, against decoding every prefix anew."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime.detokenizer import BROKEN, StopWatch, TextStream, offsets, whole_text

CORPUS = [
    "the cat sat on the mat. ",
    "END of the story\n\n",
    "naïve café 日本語のテキスト 🙂🙃 ",
    "stop, STOP; ###\nUser: ",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE, small enough that rare characters are made of several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
    )
    return tokenizer


@pytest.fixture(scope="module")
def decode(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def brute_force(decode: Callable[[list[int]], str], tokens: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    """(tokens needed, text before the first stop) of the shortest prefix whose settled text has a stop in it."""
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count]).rstrip("\ufffd")
        if found := [text.index(stop) for stop in stops if stop in text]:
            return count, text[: min(found)]
    return None


def watch(decode: Callable[[list[int]], str], tokens: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    watcher = StopWatch(decode, stops)
    for count, token in enumerate(tokens, 1):
        if (stopped := watcher.push(token)) is not None:
            return count, stopped.text
    return None


def a_stop(rng: random.Random, text: str) -> str:
    """A piece of the text, whose ends rarely are where tokens end, or something that is not in it."""
    if not text or rng.random() < 0.2:
        return rng.choice(["@@", "日本人", "stop!"])
    start = rng.randrange(len(text))
    return text[start : start + rng.randint(1, 8)].strip("\ufffd") or "x"


@pytest.mark.parametrize("kind", ["text", "pieces", "bytes", "any"])
def test_stops_where_decoding_every_prefix_would(kind: str, tokenizer: Tokenizer, decode: Callable, seed: int) -> None:
    """Of proper text in the tokenizer's own tokens, and in single bytes; of broken bytes; of any tokens at all."""
    rng = random.Random(f"{seed} {kind}")
    single = {byte: tokenizer.token_to_id(character) for byte, character in byte_characters().items()}
    stopped = 0
    for _ in range(150):
        text = "".join(rng.choice(CORPUS) for _ in range(3))[rng.randrange(20) :]
        if kind == "text":
            tokens = tokenizer.encode(text).ids
        elif kind == "pieces":
            tokens = [single[byte] for byte in text.encode()]
        elif kind == "bytes":
            tokens = [single[rng.choice([0x41, 0x42, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0xFF])] for _ in range(40)]
        else:
            tokens = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(40)]
        stops = tuple(a_stop(rng, decode(tokens)) for _ in range(rng.randint(1, 3)))
        expected = brute_force(decode, tokens, stops)
        assert watch(decode, tokens, stops) == expected, (tokens, stops)
        stopped += expected is not None
    assert stopped > 30


def brute_force_with_all(
    decode: Callable[[list[int]], str], tokens: list[int], stops: tuple[str, ...], include: bool, min_tokens: int
) -> tuple[int, str, str] | None:
    """(tokens needed, text left, the stop) of the shortest prefix of more than `min_tokens` with a stop that ends there."""
    floor = len(decode(tokens[:min_tokens]).rstrip(BROKEN))
    for count in range(min_tokens + 1, len(tokens) + 1):
        text = decode(tokens[:count]).rstrip(BROKEN)
        places = [(at, stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
        if found := [(at, stop) for at, stop in places if at + len(stop) > floor]:
            at, stop = min(found, key=lambda pair: (pair[0], stops.index(pair[1])))
            return count, text[: at + len(stop) * include], stop
    return None


def test_what_is_included_and_what_is_exempt(tokenizer: Tokenizer, decode: Callable, seed: int) -> None:
    """`include_stop_str_in_output` and `min_tokens`, against looking through every prefix."""
    rng = random.Random(seed)
    stopped = 0
    for _ in range(150):
        text = "".join(rng.choice(CORPUS) for _ in range(3))[rng.randrange(20) :]
        tokens = tokenizer.encode(text).ids
        stops = tuple(a_stop(rng, decode(tokens)) for _ in range(rng.choice([1, 3, 16])))
        include, min_tokens = rng.random() < 0.5, rng.choice([0, 1, 2, 5, 10])
        watcher = StopWatch(decode, stops, include, min_tokens)
        came = [(count, stop) for count, token in enumerate(tokens, 1) if (stop := watcher.push(token)) is not None]
        expected = brute_force_with_all(decode, tokens, stops, include, min_tokens)
        assert (came[0][0], *came[0][1]) == expected if came else expected is None, (tokens, stops, include, min_tokens)
        stopped += expected is not None
    assert stopped > 30


def test_offsets_are_those_of_every_prefix(tokenizer: Tokenizer, decode: Callable, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        tokens = tokenizer.encode("".join(rng.choice(CORPUS) for _ in range(3))[rng.randrange(20) :]).ids
        lengths = [len(decode(tokens[:count]).rstrip(BROKEN)) for count in range(len(tokens))]
        assert offsets(decode, tokens) == lengths
        stream = TextStream(decode)
        assert [stream.push(token) for token in tokens][-1] == whole_text(decode, tokens)


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_character_that_was_only_begun_is_left_out(cut: int, tokenizer: Tokenizer, decode: Callable) -> None:
    tokens = ids(tokenizer, "naïve 🙂".encode()[: -4 + cut] if cut < 4 else "naïve 🙂".encode())
    assert whole_text(decode, tokens) == ("naïve " if cut < 4 else "naïve 🙂")
    inside = [*ids(tokenizer, b"a\xf0\x9f"), *ids(tokenizer, b"b")]
    assert whole_text(decode, inside).endswith("b"), "what is broken for good is shown as such"


def byte_characters() -> dict[int, str]:
    """GPT-2's character for every byte: itself where it can be printed, and the characters from 256 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    characters = byte_characters()
    return [tokenizer.token_to_id(characters[byte]) for byte in raw]


def test_a_character_over_several_tokens(tokenizer: Tokenizer, decode: Callable) -> None:
    tokens = ids(tokenizer, "a🙂b".encode())
    assert watch(decode, tokens, ("🙂",)) == (5, "a")
    assert watch(decode, tokens, ("🙂b",)) == (6, "a")


def test_a_stop_and_the_first_bytes_of_the_next_character_in_one_token() -> None:
    """The character's end may never come; the stop is there all the same."""
    words = {0: b"x", 1: b"END\xf0\x9f", 2: b"y"}
    assert watch(lambda tokens: b"".join(words[t] for t in tokens).decode(errors="replace"), [0, 1, 2], ("END",)) == (2, "x")


def test_the_earliest_of_two_stops_counts() -> None:
    words = {0: "say ", 1: "one two"}
    assert watch(lambda tokens: "".join(words[t] for t in tokens), [0, 1], ("two", "one t")) == (2, "say ")


def test_special_tokens_make_no_text(tokenizer: Tokenizer, decode: Callable) -> None:
    end = tokenizer.token_to_id("<end>")
    tokens = [end, *ids(tokenizer, b"a"), end, end, *ids(tokenizer, b"b")]
    assert watch(decode, tokens, ("ab",)) == (5, "")


def test_a_decoder_that_drops_the_first_space() -> None:
    """As those of sentencepiece vocabularies do: a token means other text at the start than after another."""
    words = {0: "▁one", 1: "▁two"}

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    assert watch(decode, [0, 1, 1], ("e two t",)) == (3, "on")


def test_no_stops_no_work() -> None:
    def never(tokens: list[int]) -> str:
        raise AssertionError("decoded for nothing")

    assert watch(never, [1, 2, 3], ()) is None


def test_only_a_short_tail_is_decoded() -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return "x" * len(tokens)

    assert watch(decode, [0] * 1000, ("y",)) is None
    assert longest <= 3
