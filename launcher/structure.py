"""Structured output: what a request wants its text to be, as a grammar in the one notation that ranks compile."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from launcher.strict import Given, Strict
from runtime.grammar import GrammarError

WHITE_SPACE = r"[ \t\n\r]{0,80}"  # enough for any indentation; some models, once they begin with it, never come to an end
KINDS = ("json", "regex", "choice", "grammar", "json_object")


class JsonSchema(Strict):
    """OpenAI's wrapping of a schema; its name and description are for models that read them."""

    model_config = ConfigDict(validate_by_name=False)

    name: str | None = Field(None, description="a string")
    description: str | None = Field(None, description="a string")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema")
    strict: bool | None = Field(None, description="true or false")


class ResponseFormat(Strict):
    """OpenAI's way to ask."""

    type: Literal["text", "json_object", "json_schema"] = Field(description='"text", "json_object" or "json_schema"')
    json_schema: JsonSchema | None = Field(None, description='an object with a "schema"')


class StructuredOutputs(Strict):
    """vLLM's way to ask: one of KINDS, and for the two of JSON how white space is treated."""

    json_: dict[str, Any] | Given | None = Field(None, alias="json", description="a JSON schema, an object or its text")
    regex: Given | None = Field(None, description="a regular expression")
    choice: Annotated[list[Given], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="a list of strings, none empty"
    )
    grammar: Given | None = Field(None, description="a grammar in Lark's notation or GBNF")
    json_object: Literal[True] | None = Field(None, description="true")
    disable_any_whitespace: bool | None = Field(None, description="true or false")
    whitespace_pattern: Given | None = Field(None, description="a regular expression")

    @property
    def asked(self) -> list[str]:
        """Which of KINDS are given."""
        values = (self.json_, self.regex, self.choice, self.grammar, self.json_object)
        return [kind for kind, value in zip(KINDS, values, strict=True) if value is not None]


def grammar_of(format_: ResponseFormat | None, outputs: StructuredOutputs | None) -> str | None:
    """The grammar that a request's parameters come to, of which one at most asks for something; None for free text.

    Raises GrammarError for what has no form in the notation; whether the rest makes sense shows when it is compiled.
    """
    if format_ is not None and format_.json_schema is not None:
        return of_schema(format_.json_schema.schema_)
    if format_ is not None and format_.type == "json_object":
        return of_schema({"type": "object"})
    if outputs is None:
        return None
    if outputs.regex is not None:
        return of_regex(outputs.regex)
    if outputs.choice is not None:
        return of_choice(outputs.choice)
    if outputs.grammar is not None:
        return of_grammar(outputs.grammar)
    schema = {"type": "object"} if outputs.json_ is None else outputs.json_
    return of_schema(schema, outputs.disable_any_whitespace is not True, outputs.whitespace_pattern)


def of_schema(schema: dict[str, Any] | str, whitespace: bool = True, pattern: str | None = None) -> str:
    """JSON that a schema describes, with or without white space between its tokens. pattern: of the white space."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise GrammarError(f"the schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise GrammarError("the schema is not an object")
    options = {"whitespace_pattern": pattern or WHITE_SPACE} if whitespace else {"whitespace_flexible": False}
    return f"start: %json {json.dumps(schema | {'x-guidance': options})}"


def of_regex(regex: str) -> str:
    r"""Text that a regular expression matches as a whole, in which \d, \w and \s mean ASCII."""
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(regex, 'dws')}/"


def of_choice(texts: list[str]) -> str:
    """One of some texts."""
    return "start: " + " | ".join(map(json.dumps, texts))


def of_grammar(text: str) -> str:
    """A context-free grammar in Lark's notation, or in GBNF, which is rewritten. Raises GrammarError."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # of its parser's own kinds
        raise GrammarError(f"the grammar cannot be read: {error}") from error
