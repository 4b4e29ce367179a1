"""What happens to the coordinator, and what it wants done about it."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.messages import Failure, Farewell, Hello, Message, Report, Verdict
from runtime.request import Completion, Request


@dataclass(frozen=True, slots=True)
class Submit:
    """Event: a request to run."""

    request: Request


@dataclass(frozen=True, slots=True)
class NoMoreRequests:
    """Event: the input has been read to its end."""


@dataclass(frozen=True, slots=True)
class Silent:
    """Event: nothing was heard of this rank for longer than the limit."""

    rank: int
    seconds: float


Event = Submit | NoMoreRequests | Silent | Hello | Verdict | Report | Failure | Farewell


@dataclass(frozen=True, slots=True)
class Send:
    """Action: send the message to these ranks."""

    ranks: tuple[int, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Finished:
    """Action: make this completion last."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class Refused:
    """Action: this request cannot be run here, for this reason; the others go on."""

    index: int
    reason: str


Action = Send | Finished | Refused
