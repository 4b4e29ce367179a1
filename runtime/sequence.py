"""A running sequence: its tokens, how far they are decided and how far computed.

The coordinator and every rank of a group hold the same `Sequence` and move it by the same calls, so that they agree
without telling each other more than the decided tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.grammar import Guide
from runtime.request import SamplingParams
from runtime.verify import NOTHING

GREEDY_BELOW = 1e-5  # temperatures under this are 0, as in vLLM: logits over them would overflow


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are chosen: the fields of `SamplingParams` that ranks need, named and meant alike."""

    temperature: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    bad_words: list[list[int]] = field(default_factory=list)
    grammar: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> Sampling:
        return cls(
            temperature=float(params.temperature),
            seed=params.seed,
            min_tokens=params.min_tokens,
            top_p=float(params.top_p),
            top_k=params.top_k,
            min_p=float(params.min_p),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            repetition_penalty=float(params.repetition_penalty),
            logit_bias={token: float(bias) for token, bias in params.logit_bias},
            allowed_token_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
            bad_words=[list(word) for word in params.bad_words],
            grammar=params.grammar,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )

    @property
    def edits(self) -> bool:
        """Whether logits are changed or forbidden before the temperature, at some position at least."""
        return self.min_tokens > 0 or self.always_edits

    @property
    def always_edits(self) -> bool:
        """Whether they are however long the output is."""
        return bool(self.logit_bias or self.bad_words or self.presence_penalty or self.frequency_penalty) or (
            self.allowed_token_ids is not None or self.grammar is not None or self.repetition_penalty != 1
        )

    @property
    def filters(self) -> bool:
        """Whether only some of the likeliest tokens are left to choose from; the best one always is."""
        return self.temperature >= GREEDY_BELOW and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def plain(self) -> bool:
        """Whether the rule alone decides: nothing is changed, filtered, or asked of the logits."""
        return not (self.edits or self.filters or self.logprobs is not None or self.prompt_logprobs is not None)


@dataclass(slots=True)
class Sequence:
    """One request while it runs.

    tokens: prompt and output, all of them committed (decided, never to change).
    num_computed: leading tokens whose keys and values are in the cache; always less than `num_committed`, because the
        last token is an input still to be computed. A rollback is nothing but a smaller `num_computed`.
    blocks: the cache blocks of this sequence, in order of position.
    allowance: the most drafts of a round, by their source, from 1 on (`runtime.drafting.drafter`).
    index, copy: its name, as in `runtime.request.Request`.
    borrows: whether it may start behind blocks that another copy of its prompt has computed; not where the whole prompt's
        log-probabilities are wanted, which come from computing it.
    limit: committed tokens at which it ends ("length"); ends: token ids that end it ("stop"). premature: ids that may not
        come before `min_tokens`: those, and the model's own ends where the request ignores them.
    guide: what its grammar lets follow, on ranks and where it has one.
    """

    index: int
    slot: int
    tokens: list[int]
    num_prompt: int
    limit: int
    ends: frozenset[int]
    sampling: Sampling
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    copy: int = 0
    borrows: bool = True
    allowance: list[int] = field(default_factory=list)
    premature: frozenset[int] = frozenset()
    guide: Guide | None = None

    @property
    def name(self) -> tuple[int, int]:
        return self.index, self.copy

    @property
    def num_committed(self) -> int:
        return len(self.tokens)

    @property
    def output(self) -> list[int]:
        """The committed tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def edits(self) -> bool:
        """Whether logits are changed or forbidden from the next token on."""
        return self.sampling.always_edits or self.num_committed - self.num_prompt < self.sampling.min_tokens

    def commit(self, tokens: Iterable[int]) -> list[int]:
        """Appends decided tokens up to the one that ends the sequence; returns those that were appended.

        NOTHING, where no token was allowed, ends it too ("error") and is not appended.

        The keys and values of all of them but the last are in the cache: a decision's tokens are drafts that stood,
        which the check computed, and one token after them, which nothing has computed yet.
        """
        kept: list[int] = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            if token == NOTHING:
                self.finish_reason = "error"
                break
            self.tokens.append(token)
            kept.append(token)
            if token in self.ends:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.limit:
                self.finish_reason = "length"
        self.num_computed = self.num_committed - 1
        return kept

    def finish(self, reason: str) -> None:
        """Ends the sequence for a cause outside the tokens themselves, such as a stop string."""
        self.finish_reason = reason
