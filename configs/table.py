"""The configuration as a Markdown table, made from the schema; `python -m configs.table` prints the README's."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from configs.schema import RunConfig, parse_bytes

NAMES = {str: "text", bool: "`true`, `false`", int: "whole number", float: "number"}


def table(schema: type[BaseModel] = RunConfig) -> str:
    """Every key of the schema: what it takes, what it is when not given, what it means."""
    head = ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
    rows = [f"| `{key}` | {takes(field)} | {default(field)} | {meaning} |" for key, field, meaning in keys(schema)]
    return "\n".join(head + rows) + "\n"


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, str]]:
    """Every key with its path, its field and its meaning; a key without one of its own has its section's."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field, field.description or first_paragraph(schema)


def takes(field: FieldInfo) -> str:
    """The values a field accepts, in words."""
    return kind(field.annotation, field.metadata)


def default(field: FieldInfo) -> str:
    """What a field is when the configuration does not name it."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "-" if value is None else f"`{text}`"


def kind(annotation: Any, metadata: list[Any]) -> str:
    """A type and the bounds that its annotations set, in words."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return kind(inner, [*metadata, *flat(extra)])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(kind(member, metadata) for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if any(isinstance(item, BeforeValidator) and item.func is parse_bytes for item in metadata):
        return "bytes, such as `40GiB`"
    return NAMES[annotation] + limits(metadata)


def flat(metadata: list[Any]) -> Iterator[Any]:
    """Metadata with that of every `Field(...)` in place of the field."""
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]


def limits(metadata: list[Any]) -> str:
    """Bounds as ` > 0` or ` 0 to 32`; nothing where there are none."""
    low = next((item.ge for item in metadata if isinstance(item, bounds.Ge)), None)
    high = next((item.le for item in metadata if isinstance(item, bounds.Le)), None)
    above = next((item.gt for item in metadata if isinstance(item, bounds.Gt)), None)
    if low is not None and high is not None:
        return f", {low} to {high}"
    if low is not None:
        return f" ≥ {low}"
    return "" if above is None else f" > {above}"


def first_paragraph(schema: type[BaseModel]) -> str:
    """A section's docstring up to its first empty line, on one line."""
    return " ".join((schema.__doc__ or "").split("\n\n")[0].split())


if __name__ == "__main__":
    print(table(), end="")
