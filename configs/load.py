"""Reads a configuration: YAML, then `--set a.b=value`, then checks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.schema import RunConfig

READ_FROM = (("model", "target"), ("speculation", "model"), ("verification", "reference"), ("files", "input"))


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key and what was expected."""


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run described by a YAML file and `a.b=value` overrides, values in YAML.

    A relative model directory or input in the file is taken from beside the file where one lies there, so that a run
    can be started from anywhere; otherwise, and in overrides, from the working directory. Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            read = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
        if not isinstance(read, dict):
            raise ConfigError(f"{path} holds no keys; expected sections such as `model:`")
        tree = read
        take_from_beside(tree, Path(path).parent)
    for override in overrides:
        apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from error


def take_from_beside(tree: dict[str, Any], directory: Path) -> None:
    """Makes what the tree reads by a relative path that leads somewhere from this directory lie there, in place."""
    for section, key in READ_FROM:
        node = tree.get(section)
        name = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(name, str) and (directory / name).exists():
            node[key] = str(directory / name)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `a.b=value` in the tree, in place."""
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"--set {override}: expected a.b=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def explain(error: ValidationError) -> Iterator[str]:
    """One line a problem: the key, what is wrong, and the nearest known key where the name is unknown."""
    for problem in error.errors():
        path = [str(part) for part in problem["loc"][:2]]  # what comes behind a section's key is which of its types was tried
        key = ".".join(path) or "configuration"
        if problem["type"] == "extra_forbidden":
            known = known_keys(path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            yield f"{key}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{key}: needed, and not given"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], dict | BaseModel) else f", got {problem['input']!r}"
            yield f"{key}: {message}{given}"


def known_keys(sections: list[str]) -> list[str]:
    """The keys of the section at this path of the schema."""
    node: type[BaseModel] = RunConfig
    for section in sections:
        annotation = node.model_fields[section].annotation
        candidates = (annotation, *get_args(annotation))
        node = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(node.model_fields)
