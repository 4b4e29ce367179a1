"""Prompts of benchmarks, from every format that is taken."""

import json
from pathlib import Path

import pytest

from bench.peers import agreement
from bench.prompts import DEMO, read_prompts, write_requests
from launcher.encoder import load_tokenizer

MODEL = DEMO.parent / "target"


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_batch_files_give_their_tokens_and_kinds_take_turns(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    chat = [{"role": "user", "content": "Hello"}]
    path = lines(
        tmp_path / "in.jsonl",
        *({"custom_id": str(i), "body": {"prompt": f"import {name}\n"}} for i, name in enumerate(("os", "sys"))),
        {"custom_id": "c", "body": {"messages": chat}},
        {"custom_id": "t", "body": {"prompt": [5, 6, 7]}},
        {"custom_id": "l", "body": {"prompt": [9] * 50}},
    )
    found = read_prompts(path, MODEL, 10, 40)
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert found == [
        ("text", tokenizer("import os\n").input_ids), ("chat", asked), ("tokens", [5, 6, 7]),
        ("text", tokenizer("import sys\n").input_ids),
    ]  # fmt: skip
    assert read_prompts(path, MODEL, 2, 40) == found[:2]


def test_questions_and_folders(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    path = lines(tmp_path / "question.jsonl", {"question_id": 1, "category": "math", "turns": ["One?", "Two?"]})
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "One?"}], add_generation_prompt=True, return_dict=False)
    assert read_prompts(path, MODEL, 5, 100) == [("math", asked)]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.py").write_text("import os\n" * 50)
    assert read_prompts(folder, MODEL, 5, 8) == [(".py", tokenizer("import os\n" * 50).input_ids[:8])]


def test_what_is_no_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a batch file"):
        read_prompts(lines(tmp_path / "x.jsonl", {"question": "Why?"}), MODEL, 5, 100)
    with pytest.raises(ValueError, match="no prompt of up to 2 tokens"):
        read_prompts(lines(tmp_path / "y.jsonl", {"body": {"prompt": [1, 2, 3]}}), MODEL, 5, 2)


def test_written_requests_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    write_requests(path, [("text", [1, 2]), ("chat", [3])], 7, 0.5)
    assert [tokens for _, tokens in read_prompts(path, MODEL, 5, 9)] == [[1, 2], [3]]
    assert {json.loads(line)["body"]["max_tokens"] for line in path.read_text().splitlines()} == {7}


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreement(["abcd", "xy"], ["abXd", "xy"]) == 4 / 6
