"""Prompts for benchmarks: our batch files, Spec-Bench's questions, or a folder of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.encoder import load_tokenizer

DEMO = Path(__file__).resolve().parent.parent / "configs/demo/prompts.jsonl"
Prompt = tuple[str, list[int]]  # its kind, and its tokens


def read_prompts(path: Path, model: Path, count: int, longest: int) -> list[Prompt]:
    """The first `count` prompts of at most `longest` tokens each; of longer texts, that many tokens from the start.

    path: a batch file (`custom_id`, `body` with `prompt` or `messages`), a `question.jsonl` of Spec-Bench or MT-bench
    (`category`, `turns`, of which the first is asked), or a folder of text files. Prompts of several kinds take turns, so
    that a few of them show all. Raises ValueError for anything else, or if nothing fits.
    """
    tokenizer = load_tokenizer(model)

    def asked(messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    def tokens_of(row: dict[str, Any]) -> Prompt:
        if "turns" in row:
            return str(row.get("category", "question")), asked([{"role": "user", "content": row["turns"][0]}])
        body = row.get("body", {})
        if "messages" in body:
            return "chat", asked(body["messages"])
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return "text", tokenizer(prompt).input_ids
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            return "tokens", prompt
        raise ValueError(f"{path}: neither a batch file nor Spec-Bench's questions: {json.dumps(row)[:80]}")

    if path.is_dir():
        texts = [(file.suffix, file.read_text(errors="replace")) for file in sorted(path.rglob("*")) if file.is_file()]
        found = [(kind or "text", tokenizer(text).input_ids[:longest]) for kind, text in texts if text.strip()]
    else:
        found = [tokens_of(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    fitting = [(kind, tokens) for kind, tokens in found if 0 < len(tokens) <= longest]
    if not fitting:
        raise ValueError(f"{path} has no prompt of up to {longest} tokens")
    nth: dict[str, int] = {}
    turns = []
    for kind, tokens in fitting:
        nth[kind] = nth.get(kind, 0) + 1
        turns.append((nth[kind], kind, tokens))
    return [(kind, tokens) for _, kind, tokens in sorted(turns, key=lambda turn: turn[0])][:count]


def demo_texts() -> list[str]:
    """The texts that the demo continues; its chats are left out."""
    bodies = (json.loads(line)["body"] for line in DEMO.read_text().splitlines())
    return [body["prompt"] for body in bodies if "prompt" in body]


def write_requests(
    path: Path, prompts: Sequence[tuple[str, str | list[int]]], new_tokens: int, temperature: float
) -> None:
    """A batch file of prompts, each with its kind, and each continued by exactly `new_tokens` tokens."""
    with path.open("w") as file:
        for number, (_, prompt) in enumerate(prompts):
            body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": temperature, "ignore_eos": True, "seed": number}
            line = {"custom_id": f"r{number:04}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
