"""One line of a batch file as a checked call, and every way a line has of being refused."""

from __future__ import annotations

import codecs
import difflib
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from launcher.body import BODIES, NEUTRAL, ChatBody, CompletionBody, Envelope, Message, TextPart
from launcher.strict import Strict
from launcher.structure import JsonSchema, ResponseFormat, StructuredOutputs

M = TypeVar("M", bound=Strict)

NESTED: dict[str, tuple[type[Strict], ...]] = {  # parameters that are objects, and the objects within them
    "messages": (Message, TextPart),
    "response_format": (ResponseFormat, JsonSchema),
    "structured_outputs": (StructuredOutputs,),
}


class BadRequest(Exception):
    """A line that cannot be run: `code` is for programs, `message` names the parameter and what was expected of it."""

    def __init__(self, custom_id: str | None, code: str, message: str) -> None:
        super().__init__(message)
        self.custom_id, self.code, self.message = custom_id, code, message


@dataclass(frozen=True, slots=True)
class Call:
    """A line that passed every check that needs no tokenizer. `index` counts the requests before it in the file."""

    index: int
    custom_id: str
    body: CompletionBody | ChatBody

    @property
    def chat(self) -> bool:
        return isinstance(self.body, ChatBody)


def parse(index: int, raw: bytes) -> Call:
    """The call that line `raw` holds. Raises BadRequest, and nothing else, for whatever else it may hold."""
    line = read_object(raw)
    custom_id = line.get("custom_id")
    named = custom_id if isinstance(custom_id, str) and custom_id else None
    envelope = check(Envelope, line, named)
    kind = BODIES[envelope.url]
    given = dict(envelope.body)
    for name, neutral in NEUTRAL[kind].items():
        value = given.pop(name, None)
        if value is not None and not any(same(value, allowed) for allowed in neutral):
            only = " or ".join(json.dumps(allowed) for allowed in neutral)
            verdict = f"only {only} is supported, got {short(value)}" if neutral else "not supported"
            raise BadRequest(named, "unsupported_parameter", f"{name}: {verdict}")
    body = check(kind, given, named)
    if contradictions := list(body.contradictions()):
        raise BadRequest(named, "invalid_value", "; ".join(contradictions))
    return Call(index, envelope.custom_id, body)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadRequest for anything else: broken UTF-8 and lone surrogates too."""
    try:
        line = from_json(raw.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        # A line of its own in a file of many: the parser's "at line 1" would only mislead.
        problem = str(error).replace(" at line 1 column", " at column")
        raise BadRequest(None, "invalid_json_line", f"not JSON: {problem}") from error
    if not isinstance(line, dict):
        raise BadRequest(None, "invalid_json_line", f"expected a JSON object, got {short(line)}")
    return line


def check(model: type[M], given: dict[str, Any], custom_id: str | None) -> M:
    """The model these keys make, or BadRequest with one phrase for each parameter that is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems: dict[str, list[ErrorDetails]] = {}
        for problem in error.errors(include_url=False, include_context=False):
            problems.setdefault(str(problem["loc"][0]) if problem["loc"] else "", []).append(problem)
        told = [explain(model, group) for group in problems.values()]
        raise BadRequest(custom_id, told[0][0], "; ".join(message for _, message in told[:5])) from error


def explain(model: type[Strict], problems: list[ErrorDetails]) -> tuple[str, str]:
    """(code, message) for what is wrong with one parameter: its alternatives fail together, so the first one speaks."""
    first = problems[0]
    top, *rest = first["loc"]
    parts = NESTED.get(str(top), ())
    nested = {field.alias or name: field for part in parts for name, field in part.model_fields.items()}
    unknown = first["type"] == "extra_forbidden"
    # What is neither an index nor a field is the name that pydantic gave to an alternative of a union.
    inner = [part for part in rest if isinstance(part, int) or part in nested]
    if unknown and rest:
        inner.append(rest[-1])
    path = str(top)[:64] + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in inner)
    if unknown:
        name = str(inner[-1] if inner else top)[:64]
        known = list(nested) if inner else [*model.model_fields, *known_elsewhere(model)]
        near = difflib.get_close_matches(name, known, n=1)
        return "unknown_parameter", f"{path}: unknown parameter" + (f"; did you mean {near[0]}?" if near else "")
    if first["type"] == "missing":
        return "missing_required_parameter", f"{path}: needed, and not given"
    names = [part for part in inner if isinstance(part, str)]
    field = nested[names[-1]] if names else model.model_fields[str(top)]
    element = "an element of " if inner and isinstance(inner[-1], int) else ""
    code = "invalid_type" if all(p["type"].endswith("_type") for p in problems) else "invalid_value"
    return code, f"{path}: expected {element}{field.description}, got {short(first['input'])}"


def known_elsewhere(model: type[Strict]) -> list[str]:
    """The names that a body knows without having a field for them."""
    return [name for kind, names in NEUTRAL.items() if kind is model for name in names]


def same(value: Any, neutral: Any) -> bool:
    """Equality in JSON's sense, where 1 is 1.0 but true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def short(value: Any) -> str:
    """A value as JSON, cut to a length that fits a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # an integer of more digits than Python agrees to print
        return "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
