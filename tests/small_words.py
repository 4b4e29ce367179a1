"""Grammars over vocabularies small enough to enumerate, and what they allow by looking at every text of their language."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.structure import of_choice
from runtime.grammar import Grammars


def tokenizer_of(words: list[str]) -> Any:
    """A byte-level tokenizer whose ids are these words, of letters and digits, in order, and then its end token's."""
    tokenizer = Tokenizer(models.BPE({**{word: i for i, word in enumerate(words)}, "<end>": len(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def allowed(language: set[str], words: list[str], output: list[int]) -> set[int]:
    """The ids that may follow an output: words with which some text of the language goes on, the end where one is whole."""
    if any(token >= len(words) for token in output):
        return set()
    text = "".join(words[token] for token in output)
    found = {i for i, word in enumerate(words) if any(whole.startswith(text + word) for whole in language)}
    return found | ({len(words)} if text in language else set())


def random_regex(rng: random.Random, depth: int = 3) -> tuple[str, set[str]]:
    """A regular expression over a, b and 1, and its language, which is finite."""
    kind = rng.choice(["letter", "class", "both", "either", "maybe", "times"]) if depth else rng.choice(["letter", "class"])
    if kind == "letter":
        letter = rng.choice("ab1")
        return letter, {letter}
    if kind == "class":
        return "[ab]", {"a", "b"}
    (one, first), (two, second) = random_regex(rng, depth - 1), random_regex(rng, depth - 1)
    if kind == "both":
        return one + two, {x + y for x in first for y in second}
    if kind == "either":
        return f"({one}|{two})", first | second
    if kind == "maybe":
        return f"({one})?", {"", *first}
    return f"({one}){{0,2}}", {"", *first, *(x + y for x in first for y in first)}


# For the twelve tokens of the tests of distributions: letters, and the end.
LETTERS = list("abcdefghijk")
CHOICES = ["a", "ab", "abc", "bd", "bdd", "c", "cd", "dh", "f", "ff", "g"]
CHOICE = of_choice(CHOICES)


@cache
def letters() -> Grammars:
    return Grammars(lambda: tokenizer_of(LETTERS), len(LETTERS) + 1, frozenset([len(LETTERS)]))
