"""The coordinator's shell: gives its state machine events from the network and the clock, and carries out its actions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from configs import exits
from configs.schema import CoordinationConfig
from runtime.coordinator import Coordinator
from runtime.events import Event, NoMoreRequests, Send, Silent, Submit
from runtime.messages import Alive, Failure, Farewell, Hello, Report, Verdict
from runtime.request import Request
from runtime.wire import BadMessage
from workers.transport import Server

GRACE = 5.0  # seconds that ranks get to hear of the end and to say goodbye
REQUESTS = 4  # submitted in one turn at most, so that messages don't wait
OUTCOMES = 256  # taken from the source in one turn at most, so that many of them share one write


class Shell:
    """Runs a job to its end, on the coordinator's main thread."""

    def __init__(self, machine: Coordinator, server: Server, config: CoordinationConfig) -> None:
        self._machine = machine
        self._server = server
        self._config = config
        self._started = time.monotonic()
        self._heard: dict[int, float] = {}
        self._told: set[int] = set()  # ranks that know of an early end
        self._interrupts: list[Event] = []
        self._outcomes: list[Any] = []

    def interrupt(self, event: Event) -> None:
        """Adds an event from a signal handler; it is handled within half a heartbeat."""
        self._interrupts.append(event)

    def run(self, source: Iterator[Any], sink: Callable[[list[Any]], None]) -> None:
        """Returns when the job is over and every rank knows, or has had GRACE to.

        source: requests, read when the machine has an appetite for more; anything else in it is an outcome already.
        sink: gets all outcomes - what is finished or refused, and those of the source - in one call per turn, and returns
        once they are safe on disk.
        """
        deadline: float | None = None
        while not self._machine.over and self._told != set(self._machine.ranks):
            self._feed(source)
            self._turn()
            self._watch()
            while self._interrupts:
                self._handle(self._interrupts.pop(0))
            if self._outcomes:
                outcomes, self._outcomes = self._outcomes, []
                sink(outcomes)
            if self._machine.stop is not None:
                deadline = deadline or time.monotonic() + GRACE
                if time.monotonic() > deadline:
                    return

    def _turn(self) -> None:
        """Waits for a message, then takes all that are there."""
        timeout = 0.0 if self._machine.appetite else self._config.heartbeat / 2
        while True:
            try:
                received = self._server.receive(timeout)
            except BadMessage as error:
                self._handle(Failure(-1, exits.DISAGREED, f"a message could not be understood: {error}"))
                return
            if received is None:
                return
            identity, message = received
            if isinstance(message, Alive):
                self._heard[message.rank] = time.monotonic()
                self._answer(identity, message.rank)
            elif isinstance(message, Hello | Report | Verdict | Failure | Farewell):
                self._handle(message)
            timeout = 0.0

    def _answer(self, identity: bytes, rank: int) -> None:
        """A sign of life for a sign of life; or the early end, which a rank's watchdog acts upon at once."""
        stop = self._machine.stop
        early = stop is not None and stop.code != 0
        if self._server.send(identity, stop if stop is not None and early else Alive(-1)) and early:
            self._told.add(rank)

    def _feed(self, source: Iterator[Any]) -> None:
        """Submits requests while the machine wants some, a few at a time."""
        requests = outcomes = 0
        while requests < min(REQUESTS, self._machine.appetite) and outcomes < OUTCOMES:
            item = next(source, None)
            if item is None:
                self._handle(NoMoreRequests())
                return
            if isinstance(item, Request):
                requests += 1
                self._handle(Submit(item))
            else:
                outcomes += 1
                self._outcomes.append(item)

    def _watch(self) -> None:
        """Tells the machine of ranks that have been silent for too long."""
        now = time.monotonic()
        for rank in self._machine.ranks:
            limit = self._config.timeout if rank in self._heard else self._config.startup_timeout
            silence = now - self._heard.get(rank, self._started)
            if self._machine.stop is None and silence > limit:
                self._handle(Silent(rank, silence))

    def _handle(self, event: Event) -> None:
        for action in self._machine.handle(event):
            if not isinstance(action, Send):
                self._outcomes.append(action)
                continue
            for rank in action.ranks:
                self._server.send(b"rank-%d" % rank, action.message)
        if self._machine.stop is not None and self._machine.stop.code != 0:
            for rank in self._machine.ranks:
                self._answer(b"beat-%d" % rank, rank)
