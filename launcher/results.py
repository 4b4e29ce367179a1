"""Rows of the output, in the shapes of OpenAI's batch results and vLLM's metrics.

A row is a function of its request, but for `created` and `metrics`: when an answer came and how many drafts stood may
differ between two runs, the answer may not. `stable` takes those away, so that runs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher import logprobs
from launcher.call import Call, CompletionBody
from launcher.journal import row_id
from launcher.vocabulary import Vocabulary
from runtime.request import Completion, SpeculationStats, TokenLogprob


@dataclass(frozen=True, slots=True)
class Writer:
    """Makes the rows of one run. Rows of the same `fingerprint` and seed have the same answer for the same request."""

    model: str
    fingerprint: str
    vocabulary: Vocabulary

    def row(self, call: Call, prompt: tuple[int, ...], completions: Sequence[Completion], created: int) -> dict[str, Any]:
        """The row of a finished request: one choice for each completion, in their order.

        `created` is a Unix time in seconds; ids come from the request's index.
        """
        if isinstance(call.body, CompletionBody) and call.body.scores_only:
            completions = [without_output(completion) for completion in completions]
        first = completions[0]
        output_tokens = sum(len(completion.tokens) for completion in completions)
        stats = SpeculationStats()
        for completion in completions:
            stats.add(completion.stats)
        body: dict[str, Any] = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{call.index:08d}",
            "object": "chat.completion" if call.chat else "text_completion",
            "created": created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [self.choice(call, prompt, completion, first) for completion in completions],
            "usage": {
                "prompt_tokens": first.num_prompt_tokens,
                "completion_tokens": output_tokens,
                "total_tokens": first.num_prompt_tokens + output_tokens,
            },
            "metrics": {"speculative_decoding": metrics(stats)},
        }
        if call.chat and call.body.prompt_logprobs is not None and first.prompt_logprobs is not None:
            body["prompt_logprobs"] = logprobs.of_prompt(self.vocabulary, first.prompt_logprobs)
        return {
            "id": row_id(call.index),
            "custom_id": call.custom_id,
            "response": {"status_code": 200, "request_id": f"req-{call.index:08d}", "body": body},
            "error": None,
        }

    def choice(self, call: Call, prompt: tuple[int, ...], completion: Completion, first: Completion) -> dict[str, Any]:
        """One continuation. The prompt's log-probabilities are those of the first of all."""
        made: dict[str, Any] = {"index": completion.copy}
        if isinstance(call.body, CompletionBody):
            made |= self.text(call.body, prompt, completion, first)
            if call.body.prompt_logprobs is not None and first.prompt_logprobs is not None:
                made["prompt_logprobs"] = logprobs.of_prompt(self.vocabulary, first.prompt_logprobs)
        else:
            given = completion.logprobs
            made["message"] = {"role": "assistant", "content": completion.text}
            made["logprobs"] = None if given is None else logprobs.of_chat(self.vocabulary, given)
        return made | {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}

    def text(
        self, body: CompletionBody, prompt: tuple[int, ...], completion: Completion, first: Completion
    ) -> dict[str, Any]:
        """Text and log-probabilities of a completion, with those of the prompt before them where it is to be echoed."""
        words, special = self.vocabulary, body.skip_special_tokens is False
        echoed = ""
        if body.echo:
            echoed = body.text if isinstance(body.text, str) else words.decode_special(list(prompt))
        given = completion.logprobs
        if given is None:
            return {"text": echoed + completion.text, "logprobs": None}
        tokens = list(completion.tokens)
        entries: list[TokenLogprob | None] = list(given)
        starts = logprobs.starts_within(words, tokens, completion.text, special, base=len(echoed))
        if body.echo and first.prompt_logprobs is not None:
            # A prompt of text may have got special tokens around it, which are none of its characters.
            before = logprobs.starts_within(words, prompt, echoed, special=not isinstance(body.text, str))
            likeliest = body.logprobs or 0  # of the prompt more may have been asked for
            asked = [e and TokenLogprob(e.token, e.logprob, e.top[:likeliest]) for e in first.prompt_logprobs]
            tokens, entries, starts = [*prompt, *tokens], [*asked, *entries], before + starts
        return {"text": echoed + completion.text, "logprobs": logprobs.of_completion(words, tokens, entries, starts)}


def without_output(completion: Completion) -> Completion:
    """What is left where the prompt alone is wanted."""
    logprobs = None if completion.logprobs is None else ()
    return replace(completion, tokens=(), text="", logprobs=logprobs, finish_reason="length", stop_reason=None)


def error_row(index: int, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """The row of a request that could not be run; `custom_id` is None where the line has none."""
    return {
        "id": row_id(index),
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def metrics(stats: SpeculationStats) -> dict[str, Any]:
    """What speculation did for one request, under vLLM's names."""
    return {
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_histogram": list(stats.histogram),
        "num_spec_steps": stats.steps,
        "num_accepted_draft_tokens": stats.num_accepted,
        "num_draft_tokens": stats.num_drafted,
    }


def stable(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that is the same in every run of its request, whatever the speed, the drafter or a crash."""
    if row["response"] is None:
        return row
    body = {key: value for key, value in row["response"]["body"].items() if key not in ("created", "metrics")}
    return row | {"response": row["response"] | {"body": body}}
