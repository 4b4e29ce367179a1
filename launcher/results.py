"""Rows of the output, in the shapes of OpenAI's batch results and vLLM's metrics.

A row is a function of its request, but for `created` and `metrics`: when an answer came and how many drafts stood may
differ between two runs, the answer may not. `stable` takes those away, so that runs can be compared.
"""

from __future__ import annotations

from typing import Any

from launcher.call import Call
from launcher.journal import row_id
from runtime.request import Completion, SpeculationStats


def row(call: Call, completion: Completion, model_name: str, created: int) -> dict[str, Any]:
    """The row of a finished request. `created` is a Unix time in seconds; ids come from the request's index."""
    usage = {
        "prompt_tokens": completion.num_prompt_tokens,
        "completion_tokens": len(completion.tokens),
        "total_tokens": completion.num_prompt_tokens + len(completion.tokens),
    }
    choice: dict[str, Any] = {"index": 0}
    if call.chat:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    body = {
        "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{call.index:08d}",
        "object": "chat.completion" if call.chat else "text_completion",
        "created": created,
        "model": model_name,
        "choices": [choice | {"finish_reason": completion.finish_reason, "logprobs": None}],
        "usage": usage,
        "metrics": {"speculative_decoding": metrics(completion.stats)},
    }
    return {
        "id": row_id(call.index),
        "custom_id": call.custom_id,
        "response": {"status_code": 200, "request_id": f"req-{call.index:08d}", "body": body},
        "error": None,
    }


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
