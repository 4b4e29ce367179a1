"""Text for calibration and comparison: files of lines or of plain text, as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BadText(Exception):
    """A file holds no text that can be used; the message names the file and line."""


def texts(path: Path) -> Iterator[str]:
    """The texts of a `.jsonl` file, one object with a "text" each; of another file, its content. Raises BadText."""
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadText(f"{path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadText(f'{path}, line {number}: expected an object with "text", got {line[:60]!r}') from error
            if not isinstance(text, str):
                raise BadText(f"{path}, line {number}: text is no string")
            yield text


def windows(path: Path, tokenizer: Any, length: int, most: int | None = None) -> list[list[int]]:
    """The file's texts end to end, each followed by the end token if there is one, in windows of `length` tokens.

    At most `most` windows, spread evenly over the file. The last may be shorter, but has two tokens. Raises BadText.
    """
    stream: list[int] = []
    for text in texts(path):
        stream += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        stream += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = [stream[i : i + length] for i in range(0, len(stream) - 1, length)]
    found = [window for window in found if len(window) > 1]
    if not found:
        raise BadText(f"{path} holds no text of two tokens")
    if most is not None and len(found) > most:
        found = [found[i * len(found) // most] for i in range(most)]
    return found
