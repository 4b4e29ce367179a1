"""Requests that are under way, and what of their answers has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.call import Call
from runtime.request import Completion, Request


@dataclass(slots=True)
class Answer:
    """One request and its continuations so far, by copy."""

    call: Call
    prompt: tuple[int, ...]
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def whole(self) -> list[Completion]:
        """All continuations in order."""
        return [self.completions[copy] for copy in range(len(self.completions))]


class Answers:
    """Brings together the continuations of each prompt, which end in any order."""

    def __init__(self) -> None:
        self._open: dict[int, Answer] = {}

    def __len__(self) -> int:
        return len(self._open)

    def expect(self, call: Call, request: Request) -> None:
        """A request is about to be submitted, in as many copies as its call asks for."""
        self._open[call.index] = Answer(call, request.prompt)

    def take(self, completion: Completion) -> Answer | None:
        """The answer that this continuation completes, which is then no longer kept; None as long as some are to come."""
        answer = self._open[completion.index]
        if completion.copy in answer.completions:
            raise ValueError(f"request {completion.index} has finished its copy {completion.copy} twice")
        answer.completions[completion.copy] = completion
        if len(answer.completions) < answer.call.body.copies:
            return None
        return self._open.pop(completion.index)

    def refuse(self, index: int) -> Call | None:
        """The call of a request that cannot be run, the first time that one of its copies is refused."""
        answer = self._open.pop(index, None)
        return None if answer is None else answer.call
