"""Log-probabilities in the shapes of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.vocabulary import Vocabulary
from runtime.detokenizer import offsets
from runtime.request import TokenLogprob

LOWEST = -9999.0  # stands for less than JSON can say: the log-probability of a token that is ruled out


def of_completion(
    vocabulary: Vocabulary, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], starts: Sequence[int]
) -> dict[str, Any]:
    """`/v1/completions`: four lists of one length. A token without a log-probability is the first of a prompt.

    `starts`: where each token begins in the choice's text. The likeliest tokens always have the chosen one among them.
    """
    likeliest: list[dict[str, float] | None] = []
    for entry in logprobs:
        if entry is None:
            likeliest.append(None)
            continue
        named = {vocabulary.name(entry.token): finite(entry.logprob)}
        for token, logprob in entry.top:
            named.setdefault(vocabulary.name(token), finite(logprob))
        likeliest.append(named)
    return {
        "tokens": [vocabulary.name(token) for token in tokens],
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in logprobs],
        "top_logprobs": likeliest,
        "text_offset": list(starts),
    }


def of_chat(vocabulary: Vocabulary, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`/v1/chat/completions`: one object for each token."""
    return {
        "content": [
            one(vocabulary, entry.token, entry.logprob)
            | {"top_logprobs": [one(vocabulary, token, logprob) for token, logprob in entry.top]}
            for entry in logprobs
        ]
    }


def one(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    """A token of a chat's log-probabilities."""
    return {"token": vocabulary.text(token), "logprob": finite(logprob), "bytes": list(vocabulary.raw(token))}


def of_prompt(vocabulary: Vocabulary, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt the likeliest ones by id, and itself; null for the first.

    A rank counts from 1; that of a token which is not among the likeliest is not known, and null.
    """
    found: list[dict[str, Any] | None] = []
    for entry in logprobs:
        if entry is None:
            found.append(None)
            continue
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
        found.append(
            {
                str(token): {"logprob": finite(value), "rank": ranks.get(token), "decoded_token": vocabulary.text(token)}
                for token, value in {entry.token: entry.logprob, **dict(entry.top)}.items()
            }
        )
    return found


def starts_within(vocabulary: Vocabulary, tokens: Sequence[int], text: str, special: bool, base: int = 0) -> list[int]:
    """Where each of these tokens begins in a text that is theirs, or the first part of it; counted from `base`."""
    decode = vocabulary.decode_special if special else vocabulary.decode
    return [base + min(start, len(text)) for start in offsets(decode, tokens)]


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(float(logprob), LOWEST)
