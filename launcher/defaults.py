"""What a request's parameters are when it does not give them: a model's own recommendation, or OpenAI's numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.body import Body
from launcher.call import BadRequest, check

FILE = "generation_config.json"
FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class DefaultsError(Exception):
    """The model's generation_config.json cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Parameters of requests that bring none. `max_tokens` None is 16 for a completion and the room there is for a chat."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def read_defaults(directory: str | Path, source: str) -> Defaults:
    """The defaults of `source`: "openai", or "model" for what the model directory's generation_config.json recommends.

    Of that file only the six keys of FIELDS count, and a key that is absent or null has OpenAI's value. Raises
    DefaultsError for a file that is no JSON object, or a value that no request could give either.
    """
    path = Path(directory) / FILE
    if source == "openai" or not path.exists():
        return Defaults()
    advice = "mend it, or set sampling.defaults to openai"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DefaultsError(f"{path} cannot be read: {error}; {advice}") from error
    if not isinstance(found, dict):
        raise DefaultsError(f"{path} holds no JSON object; {advice}")
    given: dict[str, Any] = {ours: found[name] for name, ours in FIELDS.items() if found.get(name) is not None}
    try:
        body = check(Body, given, None)
    except BadRequest as error:
        raise DefaultsError(f"{path}: {error.message}; {advice}") from error
    known = {name: getattr(body, name) for name in given}
    if known.get("top_k") == -1:
        known["top_k"] = 0
    return Defaults(**known)
