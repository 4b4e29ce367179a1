"""Write the demo's requests and its held-out text, both taken from files that the demo models never saw.

Run from the repository's root, once the models are trained: ``python -m bench.demo_prompts``.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.train_demo import Document, split

REQUESTS, MAX_TOKENS = 40, 96
SHORTEST, LONGEST = 40, 200  # tokens of a prompt
HELD_OUT_BYTES = 200_000

DEFINITION = re.compile(r" *(async )?def \w+\(.*\).*:$")
MEMBER = re.compile(r"    (def|async def|@)\b")
IMPORT = re.compile(r"(import|from) ")


def cuts(lines: list[str]) -> Iterator[tuple[str, int]]:
    """Natural places to end a prompt: the kind of each, and the number of lines before it.

    They lie after a function's first line, between a class's methods and after the last of a run of imports. Blank
    lines go with what they follow, as the tokenizer joins their newlines with its own.
    """
    inside_class = False
    for i in range(1, len(lines)):
        last = next((line for line in reversed(lines[:i]) if line), "")
        if last[:1].strip():
            inside_class = last.startswith("class ")
        if not lines[i]:
            continue
        if DEFINITION.match(lines[i - 1]):
            yield "function", i
        elif inside_class and not lines[i - 1] and MEMBER.match(lines[i]):
            yield "class", i
        elif IMPORT.match(last) and last.count("(") == last.count(")") and not IMPORT.match(lines[i]):
            yield "imports", i


def prompt_before(lines: list[str], end: int, longest: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The longest passage of whole lines up to line `end` that makes a prompt of at most `longest` tokens.

    It starts the file or a paragraph of it, and has no string left open in three quotes; None where nothing fits.
    """
    best = None
    for start in range(end - 1, -1, -1):
        passage = "".join(f"{line}\n" for line in lines[start:end])
        tokens = len(tokenizer.encode(passage))
        if tokens > longest:
            break
        starts = bool(lines[start]) and (start == 0 or not lines[start - 1])
        if tokens >= SHORTEST and starts and passage.count('"""') % 2 == 0 == passage.count("'''") % 2:
            best = passage
    return best


def prompts_of(document: Document, tokenizer: PreTrainedTokenizerBase, chance: random.Random) -> list[str]:
    """Prompts from one document in random order, the kinds of their endings taking turns."""
    lines = document.text.split("\n")
    found = sorted(cuts(lines))
    chance.shuffle(found)
    kinds = [list(group) for _, group in groupby(sorted(found, key=lambda cut: cut[0]), key=lambda cut: cut[0])]
    chance.shuffle(kinds)
    turns = [cut for cut in chain.from_iterable(zip_longest(*kinds)) if cut][: REQUESTS // 4]
    made = [prompt_before(lines, end, chance.randint(2 * SHORTEST, LONGEST), tokenizer) for _, end in turns]
    return [prompt for prompt in made if prompt]


def request(index: int, prompt: str) -> dict[str, Any]:
    """An OpenAI batch request: every eighth a chat, every fourth sampled, the others greedy completions."""
    chat, sampled = index % 8 == 5, index % 4 == 3
    content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    sampling = {"temperature": 0.8, "seed": index} if sampled else {"temperature": 0}
    return {
        "custom_id": f"demo-{index:02d}",
        "method": "POST",
        "url": "/v1/chat/completions" if chat else "/v1/completions",
        "body": {**content, "max_tokens": MAX_TOKENS, **sampling},
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write `prompts.jsonl`, and `heldout.jsonl` with whole files of up to `HELD_OUT_BYTES` in all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("configs/demo"), help="folder that holds the models")
    parser.add_argument("--data", type=Path, help="the folder they were trained on (default: the standard library)")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.output / "target")
    _, held_out = split(options.data)
    chance = random.Random(0)
    rounds = zip_longest(*(prompts_of(document, tokenizer, chance) for document in held_out))
    prompts = list(dict.fromkeys(prompt for prompt in chain.from_iterable(rounds) if prompt))[:REQUESTS]
    write_lines(options.output / "prompts.jsonl", [request(i, prompt) for i, prompt in enumerate(prompts)])

    texts, size = [], 0
    for document in held_out:
        length = len(document.text.encode())
        if size + length <= HELD_OUT_BYTES:
            texts.append({"path": document.path, "text": document.text})
            size += length
    write_lines(options.output / "heldout.jsonl", texts)
    print(f"{len(prompts)} prompts; {len(texts)} held-out files of {size} bytes")


if __name__ == "__main__":
    main()
