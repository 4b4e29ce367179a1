"""What is asked of the runtime, and what it answers: tokens in, tokens and text out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends; names and meanings are vLLM's.

    `temperature` 0 is greedy. `seed` feeds the keyed noise. `max_tokens` counts output tokens. `stop` strings end the
    text before themselves (after, with `include_stop_str_in_output`); `stop_token_ids` and, unless `ignore_eos`, the
    model's own end tokens end it after themselves, none of which comes before `min_tokens`. `top_k` 0 is off. Biases are
    (token id, bias) pairs; bad words are token sequences that must not be completed; `grammar` is what the whole output
    must follow, as `runtime/grammar.py` reads it. `logprobs` n asks for each output token's
    log-probability and the n likeliest tokens', `prompt_logprobs` the same of the prompt; None asks for nothing.
    """

    temperature: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued. (`index`, `copy`) is its name everywhere in the runtime: `index` is its line in the
    input, and `copy` counts the continuations of one prompt, each with a seed of its own in `params`."""

    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    copy: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model itself (before temperature, penalties and filters), and the likeliest
    tokens at its position, (token id, log-probability), the likeliest first and the smaller id first on ties."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SpeculationStats:
    """What speculation did for one request or one job.

    `steps` are the checks in which at least one token was decided; `drafted[i]` and `accepted[i]` count the checks
    whose draft at position i was proposed and stood; `histogram[n]` counts the checks in which n drafts stood.
    """

    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    histogram: list[int] = field(default_factory=list)

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """Adds one check of `num_drafts` drafts of which the first `num_accepted` stood."""
        self.steps += 1
        for counts, upto in ((self.drafted, num_drafts), (self.accepted, num_accepted)):
            counts.extend([0] * (num_drafts - len(counts)))
            for position in range(upto):
                counts[position] += 1
        self.histogram.extend([0] * (num_accepted + 1 - len(self.histogram)))
        self.histogram[num_accepted] += 1

    def add(self, other: SpeculationStats) -> None:
        """Adds another's counts to these."""
        self.steps += other.steps
        for mine, theirs in (
            (self.drafted, other.drafted),
            (self.accepted, other.accepted),
            (self.histogram, other.histogram),
        ):
            mine.extend([0] * (len(theirs) - len(mine)))
            for position, count in enumerate(theirs):
                mine[position] += count

    @property
    def num_drafted(self) -> int:
        return sum(self.drafted)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens decided per check, the bonus token counted; 0 before the first check."""
        return 1 + self.num_accepted / self.steps if self.steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the drafts that stood; 0 where nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: output tokens (the end token included), their text, and why it ended ("stop", "length", "error").

    It ends in "error" where the request allows no token at all. `stop_reason` is then "no_token_allowed"; else the stop
    string or the id among `stop_token_ids` that ended it, and None for the model's own end tokens.
    """

    index: int
    num_prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    stats: SpeculationStats
    copy: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each output token
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # of each prompt token; None for the first
    stop_reason: str | int | None = None
