"""The watchdog of a rank: a thread that says "alive", listens for the coordinator, and ends the process if need be.

A rank spends its life inside a forward or a collective that cannot be interrupted from within, so the one thing that
always works is to leave the process: that also frees the peers, whose own waits are bounded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from configs import exits
from configs.schema import CoordinationConfig
from runtime.messages import Alive, Stop
from runtime.wire import BadMessage
from workers.transport import Client


class Watchdog(threading.Thread):
    """Runs beside a rank's main thread, on a socket of its own. `child` is the coordinator's process, where it is ours."""

    def __init__(
        self, endpoint: str, rank: int, config: CoordinationConfig, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._endpoint = endpoint
        self._rank = rank
        self._config = config
        self._child = child
        self._done = threading.Event()

    def run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # a rank without a watchdog could wait for ever
            leave(self._rank, exits.UNFORESEEN, f"its watchdog failed: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        heard, limit = time.monotonic(), self._config.startup_timeout
        with Client(self._endpoint, b"beat-%d" % self._rank, self._config.curve) as client:
            due = 0.0
            while not self._done.is_set():
                now = time.monotonic()
                if now >= due:
                    client.send(Alive(self._rank))
                    due = now + self._config.heartbeat
                try:
                    message = client.receive(min(0.1, self._config.heartbeat))
                except BadMessage as error:
                    leave(self._rank, exits.LOST, f"the coordinator cannot be understood: {error}")
                if isinstance(message, Stop) and message.code != 0:
                    leave(self._rank, message.code, message.reason)
                if self._child is not None and (code := self._child.poll()) is not None and not self._done.wait(1.0):
                    leave(self._rank, code if code > 0 else exits.LOST, f"the coordinator has ended with {code}")
                if message is not None:
                    heard, limit = time.monotonic(), self._config.timeout
                elif time.monotonic() - heard > limit:
                    leave(self._rank, exits.LOST, f"nothing heard from {self._endpoint} for {limit:.0f} seconds")

    def stop(self) -> None:
        """Ends the thread; from here on nobody watches."""
        self._done.set()
        self.join()


def leave(rank: int, code: int, reason: str) -> None:
    """Ends this process at once, whatever its other threads are in the middle of."""
    try:
        print(f"quasar: rank {rank} ends with exit code {code}: {reason}", file=sys.stderr, flush=True)
    finally:  # also where nobody reads any more what is printed
        os._exit(code)
