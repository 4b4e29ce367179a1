"""Tokens as text and as bytes: byte-level vocabularies, and those with byte fallback and a mark for the space."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launcher.vocabulary import Vocabulary, byte_characters
from runtime.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["def f(x):\n    return x\n", "naïve café 日本語のテキスト 🙂🙃", "  two  spaces ", "¶ÿ\u00ad\u007f"]


def fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece models are: a mark for the space, single bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "ab")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def bytelevel() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def demo() -> PreTrainedTokenizerFast:
    return load_tokenizer(ROOT / "configs/demo/target")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [bytelevel, fallback, demo])
def test_bytes_of_tokens_are_the_bytes_of_the_text(make: Callable, text: str) -> None:
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    raw = b"".join(map(vocabulary.raw, tokens)).decode()
    assert raw == text or (make is fallback and raw == " " + text), "which begins every text with a space"


def test_the_space_before_a_word_is_part_of_it() -> None:
    tokenizer = fallback()
    vocabulary = Vocabulary(tokenizer)
    token = tokenizer.convert_tokens_to_ids("\u2581ab")
    assert (vocabulary.text(token), vocabulary.raw(token), vocabulary.name(token)) == (" ab", b" ab", " ab")


@pytest.mark.parametrize("make", [bytelevel, fallback])
def test_names_tell_all_bytes_apart(make: Callable) -> None:
    vocabulary = Vocabulary(tokenizer := make())
    names = [vocabulary.name(token) for token in range(len(tokenizer)) if vocabulary.raw(token)]
    broken = [name for name in names if name.startswith("bytes:")]
    assert len(broken) >= 128 and len(set(broken)) == len(broken)
    assert not any("\ufffd" in name for name in names)


def test_what_the_tokenizer_does_not_know(seed: int) -> None:
    """A model may have more ids than its tokenizer."""
    vocabulary = Vocabulary(bytelevel())
    token = random.Random(seed).randrange(1000, 10**6)
    assert (vocabulary.text(token), vocabulary.raw(token)) == ("", b"")


def test_special_tokens_are_named_and_shown_on_demand() -> None:
    vocabulary = Vocabulary(tokenizer := bytelevel())
    end = tokenizer.eos_token_id
    tokens = [*tokenizer("hello", add_special_tokens=False).input_ids, end]
    assert vocabulary.name(end) == "</s>"
    assert (vocabulary.decode(tokens), vocabulary.decode_special(tokens)) == ("hello", "hello</s>")


def test_every_byte_has_its_character() -> None:
    characters = byte_characters()
    assert sorted(characters.values()) == list(range(256))
    assert set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
