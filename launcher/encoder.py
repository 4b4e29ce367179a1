"""From a call to a request: text to tokens, and the limits that only a model knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from launcher.call import BadRequest, Call, ChatBody, CompletionBody, short
from launcher.defaults import Defaults
from launcher.structure import grammar_of
from runtime.grammar import GrammarError, Grammars
from runtime.request import Request, SamplingParams
from runtime.tokenizer import load_tokenizer

DEFAULT_MAX_TOKENS = 16  # of /v1/completions; a chat answer may by default take what room there is. Both as in vLLM.

T = TypeVar("T")


class Encoder:
    """Turns calls into requests for one model. A request is a function of its call and the job's seed alone."""

    def __init__(
        self,
        tokenizer: Any,
        max_model_len: int,
        vocab_size: int,
        job_seed: int,
        defaults: Defaults | None = None,
        end_tokens: Iterable[int] = (),
    ) -> None:
        """`tokenizer` is what `load_tokenizer` gives, or the directory to give it. `defaults` are OpenAI's if not given.

        `vocab_size` and `end_tokens` are the model's, `max_model_len` counts prompt and output together. Raises
        TokenizerError.
        """
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.max_model_len, self.vocab_size, self.job_seed = max_model_len, vocab_size, job_seed
        self.defaults = defaults or Defaults()
        self.grammars = Grammars(lambda: self.tokenizer, vocab_size, frozenset(end_tokens))

    def encode(self, call: Call) -> Request:
        """The request that this call asks for. Raises BadRequest where the model cannot run it."""
        body = call.body
        prompt = self.chat(call, body) if isinstance(body, ChatBody) else self.completion(call, body)
        if not prompt:
            raise BadRequest(call.custom_id, "invalid_value", "the prompt makes no tokens")
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise BadRequest(
                call.custom_id,
                "context_length_exceeded",
                f"the prompt is {len(prompt)} tokens; {self.max_model_len - 1} leave room for one token of output",
            )
        return Request(call.index, prompt, self.params(call, room))

    def params(self, call: Call, room: int) -> SamplingParams:
        """How the output is chosen, with the defaults in place of what the call doesn't say; `room` bounds its length."""
        body, defaults = call.body, self.defaults
        wanted = body.limit or defaults.max_tokens or (room if call.chat else DEFAULT_MAX_TOKENS)
        if (body.min_tokens or 0) > wanted:
            raise BadRequest(
                call.custom_id,
                "invalid_value",
                f"min_tokens: expected a whole number from 0 to max_tokens, which is {wanted}, got {body.min_tokens}",
            )
        bias = tuple(sorted((int(token), float(value)) for token, value in (body.logit_bias or {}).items()))
        bad_words = self.bad_words(call)
        self.check_tokens(call, "stop_token_ids", body.stop_token_ids or ())
        self.check_tokens(call, "logit_bias", [token for token, _ in bias])
        self.check_tokens(call, "allowed_token_ids", body.allowed_token_ids or ())
        if body.allowed_token_ids is not None and all((token,) in bad_words for token in body.allowed_token_ids):
            raise BadRequest(call.custom_id, "invalid_value", "allowed_token_ids: bad_words leave none of them")
        top_k = given(body.top_k, defaults.top_k)
        prompt_logprobs = body.prompt_logprobs
        if prompt_logprobs is None and isinstance(body, CompletionBody) and body.echo:
            prompt_logprobs = body.logprobs
        return SamplingParams(
            temperature=given(body.temperature, defaults.temperature),
            seed=seed_of(self.job_seed, call.custom_id) if body.seed is None else body.seed,
            max_tokens=min(wanted, room),
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=min(body.min_tokens or 0, room),
            top_p=given(body.top_p, defaults.top_p),
            top_k=max(0, top_k),
            min_p=given(body.min_p, defaults.min_p),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=given(body.repetition_penalty, defaults.repetition_penalty),
            logit_bias=bias,
            allowed_token_ids=None if body.allowed_token_ids is None else tuple(sorted(set(body.allowed_token_ids))),
            bad_words=bad_words,
            grammar=self.grammar(call),
            logprobs=body.likeliest,
            prompt_logprobs=prompt_logprobs,
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
        )

    def grammar(self, call: Call) -> str | None:
        """What the output has to follow, compiled here to see whether it can be; ranks do so again by themselves."""
        body = call.body
        try:
            text = grammar_of(body.response_format, body.structured_outputs)
            if text is not None:
                self.grammars.guide(text)
        except GrammarError as error:
            asked = "response_format" if body.structured_outputs is None else "structured_outputs"
            raise BadRequest(call.custom_id, "invalid_value", f"{asked}: {error}") from error
        return text

    def bad_words(self, call: Call) -> tuple[tuple[int, ...], ...]:
        """The token sequences of words that must not come: each as it starts a text and as it follows a space.

        As in vLLM, the second counts only where it is another token in front of as many others: elsewhere its first
        token is the space alone, and forbidding what follows that is forbidding the word itself once more.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in call.body.bad_words or ():
            bare = word.lstrip()
            starting, following = (self.plain(text) for text in (bare, " " + bare))
            if not starting:
                raise BadRequest(call.custom_id, "invalid_value", f"bad_words: {short(word)} makes no tokens")
            found[starting] = None
            if len(following) == len(starting) and following[0] != starting[0]:
                found[following] = None
        self.check_tokens(call, "bad_words", [token for tokens in found for token in tokens])
        return tuple(found)

    def plain(self, text: str) -> tuple[int, ...]:
        """The tokens of a text alone."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def completion(self, call: Call, body: CompletionBody) -> tuple[int, ...]:
        """The tokens of a prompt: text with the special tokens that the tokenizer puts around it, ids as they are."""
        tokens = self.tokenizer(body.text, verbose=False).input_ids if isinstance(body.text, str) else body.text
        self.check_tokens(call, "prompt", tokens)
        return tuple(tokens)

    def chat(self, call: Call, body: ChatBody) -> tuple[int, ...]:
        """The tokens of messages under the model's chat template, up to where the answer begins."""
        if not self.tokenizer.chat_template:
            raise BadRequest(call.custom_id, "no_chat_template", "the model has no chat template; use /v1/completions")
        messages = [message.plain() for message in body.messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is the model's code: it refuses what it likes, as it likes
            raise BadRequest(call.custom_id, "invalid_value", f"messages: the chat template says: {error}") from error
        tokens = self.plain(text)  # the template wrote its own special tokens
        self.check_tokens(call, "messages", tokens)
        return tokens

    def check_tokens(self, call: Call, name: str, tokens: Any) -> None:
        """Raises BadRequest for an id that the model has no embedding for."""
        if tokens and max(tokens) >= self.vocab_size:
            raise BadRequest(
                call.custom_id,
                "invalid_value",
                f"{name}: token id {max(tokens)} is not in the vocabulary, which ends at {self.vocab_size - 1}",
            )


def seed_of(job_seed: int, custom_id: str) -> int:
    """The seed of a request that brings none: the same after every restart, and unrelated to its neighbours'."""
    digest = blake2b(f"{job_seed}\0{custom_id}".encode(), digest_size=8, person=b"request seed").digest()
    return int.from_bytes(digest, "little") >> 1


def copies(request: Request, count: int) -> Iterator[Request]:
    """The continuations of one prompt: the request itself, then others with seeds of their own.

    The prompt's log-probabilities are the same in all of them, so that only the first is asked for them.
    """
    yield request
    for copy in range(1, count):
        params = replace(request.params, seed=copy_seed(request.params.seed, copy), prompt_logprobs=None)
        yield replace(request, params=params, copy=copy)


def copy_seed(seed: int, copy: int) -> int:
    """The seed of a further continuation: a function of the request's seed and the copy's number alone."""
    digest = blake2b(f"{seed}\0{copy}".encode(), digest_size=8, person=b"copy seed").digest()
    return int.from_bytes(digest, "little") >> 1


def given(value: T | None, default: T) -> T:
    """What was asked for, or else the default."""
    return default if value is None else value
