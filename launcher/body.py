"""What a line of a batch file may say: the envelope around a request and the two endpoints' bodies.

The format is OpenAI's batch input, the parameters' names and defaults are vLLM's. A parameter lives in one of two
places: as a field of a body, where it means something, or in `NEUTRAL`, where it is known but only the value that
changes nothing is accepted. Whoever implements one deletes it from `NEUTRAL` and adds the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from launcher.strict import Given, Strict
from launcher.structure import KINDS, ResponseFormat, StructuredOutputs

Limit = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(fail_fast=True)]
Tokens = "a whole number from 1 to 2147483647"
Prompt = Given | Annotated[TokenIds, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Ten digits are more than any vocabulary needs, and few enough for every reader of numbers.
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Likeliest = Annotated[int, Field(ge=0, le=20)]


class Envelope(Strict):
    """What stands around a body."""

    custom_id: Given = Field(description="a string, not empty")
    method: Literal["POST"] = Field(description='"POST"')
    url: Literal["/v1/completions", "/v1/chat/completions"] = Field(description='"/v1/completions" or "/v1/chat/completions"')
    body: dict[str, Any] = Field(description="an object")


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"] = Field(description='"text"')
    text: str = Field(description="a string")


class Message(Strict):
    """One turn of a chat. An answer may be put back as it came, with what it has no use for."""

    role: Given = Field(description="a string, not empty")
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description='a string or a list of {"type": "text", "text": ...}'
    )
    name: str | None = Field(None, description="a string")
    refusal: None = Field(None, description="null")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="an empty list")
    audio: None = Field(None, description="null")
    function_call: None = Field(None, description="null")
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="an empty list")

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it: text parts joined by newlines, as vLLM joins them."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class Body(Strict):
    """What both endpoints share. A parameter that is null is a parameter that is not given."""

    model: str | None = Field(None, description="a string")
    user: str | None = Field(None, description="a string")
    safety_identifier: str | None = Field(None, description="a string")
    prompt_cache_key: str | None = Field(None, description="a string")
    cache_salt: str | None = Field(None, description="a string")
    metadata: dict[str, Any] | None = Field(None, description="an object")
    max_tokens: Limit | None = Field(None, description=Tokens)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="a number from 0 to 2")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="a whole number from -2^63 to 2^63 - 1"
    )
    stop: Given | Annotated[list[Given], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="a string or a list of up to 16 strings, none empty"
    )
    stop_token_ids: TokenIds | None = Field(None, description="a list of token ids")
    include_stop_str_in_output: bool | None = Field(None, description="true or false")
    ignore_eos: bool | None = Field(None, description="true or false")
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="a whole number from 0 to max_tokens"
    )
    skip_special_tokens: bool | None = Field(None, description="true or false")
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="a whole number from 1 to 128")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="a number above 0, up to 1")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="a whole number from 1 on, or 0 or -1 for no limit"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="a number from 0 to 1")
    presence_penalty: Penalty | None = Field(None, description="a number from -2 to 2")
    frequency_penalty: Penalty | None = Field(None, description="a number from -2 to 2")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="a number above 0, up to 10"
    )
    logit_bias: dict[TokenIdText, Bias] | None = Field(
        None, description="an object of token ids, as strings, with numbers from -100 to 100"
    )
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = Field(
        None, description="a list of token ids, not empty"
    )
    bad_words: Annotated[list[Given], Field(fail_fast=True)] | None = Field(
        None, description="a list of strings, none empty"
    )
    prompt_logprobs: Likeliest | None = Field(None, description="a whole number from 0 to 20")
    response_format: ResponseFormat | None = Field(None, description='an object with a "type"')
    structured_outputs: StructuredOutputs | None = Field(
        None, description="an object with one of json, regex, choice, grammar, json_object"
    )
    stream: Literal[False] | None = Field(None, description="false (a batch is not streamed)")

    @property
    def limit(self) -> int | None:
        """Output tokens asked for, if any were."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def copies(self) -> int:
        """Continuations asked for."""
        return self.n or 1

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are wanted at each position of the output; None for no log-probabilities."""
        raise NotImplementedError

    def contradictions(self) -> Iterator[str]:
        """What parameters that are right by themselves say against each other, as far as no model is needed for it."""
        asked = self.structured_outputs.asked if self.structured_outputs is not None else []
        formatted = self.response_format is not None and self.response_format.type != "text"
        if self.structured_outputs is not None and len(asked) != 1:
            yield f"structured_outputs: expected one of {', '.join(KINDS)}, got {' and '.join(asked) or 'none'}"
        if asked and formatted:
            yield "response_format: only text is supported with structured_outputs"
        if self.response_format is not None and (self.response_format.type == "json_schema") is (
            self.response_format.json_schema is None
        ):
            yield "response_format.json_schema: expected with the type json_schema, and only there"
        if (asked or formatted) and self.ignore_eos:
            yield "ignore_eos: only false is supported with structured output, whose end is an end token"


class CompletionBody(Body):
    """`/v1/completions`: text or token ids to be continued."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=1)] = Field(
        description="a string or a list of token ids, not empty, or a list of one such"
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description=f"{Tokens}; 0 with echo")
    logprobs: Likeliest | None = Field(None, description="a whole number from 0 to 20")
    echo: bool | None = Field(None, description="true or false")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="a whole number from 1 to 128")

    @property
    def limit(self) -> int | None:
        return 1 if self.scores_only else self.max_tokens

    @property
    def scores_only(self) -> bool:
        """Whether the prompt alone is wanted, with what is known of it; as in vLLM a token is made, and not shown."""
        return self.max_tokens == 0

    @property
    def text(self) -> str | list[int]:
        """The one prompt, in words or ids."""
        first = self.prompt[0]
        return self.prompt if isinstance(first, int) or isinstance(self.prompt, str) else first  # type: ignore[return-value]

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.max_tokens == 0 and not self.echo:
            yield "max_tokens: 0 is supported with echo: true only"
        if self.best_of is not None and self.best_of != self.copies:
            yield f"best_of: only the value of n, {self.copies}, is supported, got {self.best_of}"


class ChatBody(Body):
    """`/v1/chat/completions`: messages to be answered."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] = Field(
        description="a list of {role, content} objects, not empty"
    )
    max_completion_tokens: Limit | None = Field(None, description=Tokens)
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: Likeliest | None = Field(None, description="a whole number from 0 to 20")

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.top_logprobs and not self.logprobs:
            yield f"top_logprobs: only 0 is supported without logprobs: true, got {self.top_logprobs}"


BODIES: dict[str, type[CompletionBody] | type[ChatBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}

# What is known and not supported yet, with the values (besides null) that change nothing.
BOTH: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "early_stopping": (False,),
    "detokenize": (True,),
    "logprob_token_ids": ([],),
    "flat_logprobs": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "stream_options": (),
    "priority": (0,),
}
NEUTRAL: dict[type[CompletionBody] | type[ChatBody], dict[str, tuple[Any, ...]]] = {
    CompletionBody: {
        **BOTH,
        "suffix": ("",),
        "add_special_tokens": (True,),
    },
    ChatBody: {
        **BOTH,
        "echo": (False,),
        "tools": ([],),
        "functions": ([],),
        "function_call": ("none",),
        "documents": ([],),
        "prediction": (),
        "web_search_options": (),
        "audio": (),
        "verbosity": (),
        "include_reasoning": (True,),
        "mm_processor_kwargs": ({},),
        "tool_choice": ("none",),
        "parallel_tool_calls": (True, False),
        "reasoning_effort": (),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
    },
}
