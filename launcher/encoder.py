"""From a call to a request: text to tokens, and the limits that only a model knows."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

from launcher.call import BadRequest, Call, ChatBody, CompletionBody
from runtime.request import Request, SamplingParams

DEFAULT_MAX_TOKENS = 16  # of /v1/completions; a chat answer may by default take what room there is. Both as in vLLM.


class TokenizerError(Exception):
    """The model's tokenizer cannot be loaded."""


class Encoder:
    """Turns calls into requests for one model. A request is a function of its call and the job's seed alone."""

    def __init__(self, tokenizer: Any, max_model_len: int, vocab_size: int, job_seed: int) -> None:
        """`tokenizer` is what `load_tokenizer` gives, or the directory to give it.

        `vocab_size` is the model's, `max_model_len` counts prompt and output together. Raises TokenizerError.
        """
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.max_model_len, self.vocab_size, self.job_seed = max_model_len, vocab_size, job_seed

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
        self.check_tokens(call, "stop_token_ids", body.stop_token_ids or ())
        wanted = body.limit or (room if call.chat else DEFAULT_MAX_TOKENS)
        params = SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            seed=seed_of(self.job_seed, call.custom_id) if body.seed is None else body.seed,
            max_tokens=min(wanted, room),
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
        )
        return Request(call.index, prompt, params)

    def completion(self, call: Call, body: CompletionBody) -> tuple[int, ...]:
        """The tokens of a prompt: text with the special tokens that the tokenizer puts around it, ids as they are."""
        tokens = self.tokenizer(body.prompt, verbose=False).input_ids if isinstance(body.prompt, str) else body.prompt
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
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # the template wrote its own
        self.check_tokens(call, "messages", tokens)
        return tuple(tokens)

    def check_tokens(self, call: Call, name: str, tokens: Any) -> None:
        """Raises BadRequest for an id that the model has no embedding for."""
        if tokens and max(tokens) >= self.vocab_size:
            raise BadRequest(
                call.custom_id,
                "invalid_value",
                f"{name}: token id {max(tokens)} is not in the vocabulary, which ends at {self.vocab_size - 1}",
            )


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model directory. Raises TokenizerError; never looks anywhere but there.

    AutoTokenizer and not a class of our choice, because the rules by which it picks one belong to the model's format.
    It imports torch, so it is imported here and not at the top: nothing else of the launcher's files needs either.
    """
    if not Path(directory).is_dir():
        raise TokenizerError(f"no tokenizer: {directory} is not a directory")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever a broken directory makes transformers raise
        raise TokenizerError(f"cannot load the tokenizer of {directory}: {error}") from error


def seed_of(job_seed: int, custom_id: str) -> int:
    """The seed of a request that brings none: the same after every restart, and unrelated to its neighbours'."""
    digest = blake2b(f"{job_seed}\0{custom_id}".encode(), digest_size=8, person=b"request seed").digest()
    return int.from_bytes(digest, "little") >> 1
