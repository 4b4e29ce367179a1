"""What is kept of a sequence beside its tokens, and what it comes to in the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.detokenizer import Decode, Stopped, StopWatch, whole_text
from runtime.request import Completion, Request, SpeculationStats, TokenLogprob
from runtime.sequence import Sequence

DEAD_END = "no_token_allowed"  # what stopped a sequence that ended in "error"


@dataclass(slots=True)
class Track:
    """What the coordinator alone knows of a sequence. `own_ends`: the model's ends, where the request heeds them."""

    request: Request
    stats: SpeculationStats
    decode: Decode
    watch: StopWatch
    own_ends: frozenset[int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position; a later one is written over an earlier

    def completion(self, sequence: Sequence, stopped: Stopped | None) -> Completion:
        """What a sequence that has ended came to. `stopped`: by which stop string, if it was one."""
        params, output = self.request.params, sequence.output
        reason: str | int | None = None
        if stopped is not None:
            text, reason = stopped
        else:
            ended = sequence.finish_reason == "stop"
            shown = output[:-1] if ended and not params.include_stop_str_in_output else output
            text = whole_text(self.decode, shown)
            if ended and output[-1] in params.stop_token_ids and output[-1] not in self.own_ends:
                reason = output[-1]
            if sequence.finish_reason == "error":
                reason = DEAD_END
        assert sequence.finish_reason is not None
        return Completion(
            index=sequence.index,
            num_prompt_tokens=sequence.num_prompt,
            tokens=tuple(output),
            text=text,
            finish_reason=sequence.finish_reason,
            stats=self.stats,
            copy=sequence.copy,
            stop_reason=reason,
            logprobs=self._output_logprobs(sequence),
            prompt_logprobs=self._prompt_logprobs(sequence),
        )

    def _output_logprobs(self, sequence: Sequence) -> tuple[TokenLogprob, ...] | None:
        """Of every output token, where the request asks for them."""
        if self.request.params.logprobs is None:
            return None
        return tuple(self.logprobs[position] for position in range(sequence.num_prompt, sequence.num_committed))

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
        """Of every prompt token, where the request asks for them; nothing foretells the first."""
        if self.request.params.prompt_logprobs is None:
            return None
        return (None, *(self.logprobs[position] for position in range(1, sequence.num_prompt)))
