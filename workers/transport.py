"""ZeroMQ sockets that carry messages: a ROUTER for the coordinator, a DEALER for every rank."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from runtime.messages import Message
from runtime.wire import decode, encode

MAX_MESSAGE = 256 * 2**20  # bytes of a frame; a peer that sends more is cut off
LINGER_MS = 2000
SERVER_KEYS, CLIENT_KEYS = "coordinator", "rank"


class TransportError(Exception):
    """The endpoint or its keys cannot be used, or a peer cannot be reached; the message says what to do."""


def is_local(endpoint: str) -> bool:
    """Whether nothing outside this host can reach the endpoint."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    match = re.fullmatch(r"tcp://\[?([^\]]+?)\]?:(\d+|\*)", endpoint)
    if match is None:
        raise TransportError(f"coordination.endpoint {endpoint!r}: expected tcp://HOST:PORT or ipc://PATH")
    try:
        return ipaddress.ip_address(match[1]).is_loopback
    except ValueError:
        return match[1] == "localhost"


class Endpoint:
    """A socket with this project's limits on it, and CURVE where it can be reached from outside."""

    def __init__(self, kind: int, endpoint: str, curve: str | None) -> None:
        if curve is None and not is_local(endpoint):
            raise TransportError(
                f"coordination.endpoint {endpoint} can be reached from other hosts: make keys with "
                "`python -m workers.keys DIR`, give every rank that directory and set coordination.curve to it"
            )
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.linger = LINGER_MS
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self._authenticator: ThreadAuthenticator | None = None
        if curve is not None:
            self._encrypt(Path(curve), server=kind == zmq.ROUTER)

    def _encrypt(self, keys: Path, server: bool) -> None:
        try:
            public, secret = zmq.auth.load_certificate(keys / f"{SERVER_KEYS if server else CLIENT_KEYS}.key_secret")
            peer, _ = zmq.auth.load_certificate(keys / f"{CLIENT_KEYS if server else SERVER_KEYS}.key")
        except (OSError, ValueError) as error:
            raise TransportError(f"coordination.curve: {error}; make keys with `python -m workers.keys DIR`") from error
        self.socket.curve_publickey, self.socket.curve_secretkey = public, secret or b""
        if server:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(domain="*", credentials_provider=OnlyKey(peer))
            self.socket.curve_server = True
        else:
            self.socket.curve_serverkey = peer

    def close(self) -> None:
        self.socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(LINGER_MS)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class OnlyKey:
    """Lets in whoever proves to hold one key, given as Z85 text."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


class Server(Endpoint):
    """The coordinator's side. A peer is named by its identity, such as b"rank-3" or b"beat-3"."""

    def __init__(self, endpoint: str, curve: str | None = None) -> None:
        super().__init__(zmq.ROUTER, endpoint, curve)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(f"cannot listen on {endpoint}: {error}") from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def receive(self, timeout: float) -> tuple[bytes, Message] | None:
        """The next message and who sent it, or None after `timeout` seconds. Raises BadMessage."""
        if not self.socket.poll(int(timeout * 1000)):
            return None
        identity, *frames = self.socket.recv_multipart()
        return identity, decode(frames)

    def send(self, identity: bytes, message: Message) -> bool:
        """Sends; False if the peer is not connected (any more)."""
        try:
            self.socket.send_multipart([identity, *encode(message)])
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True


class Client(Endpoint):
    """A rank's side."""

    def __init__(self, endpoint: str, identity: bytes, curve: str | None = None) -> None:
        super().__init__(zmq.DEALER, endpoint, curve)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)

    def receive(self, timeout: float | None) -> Message | None:
        """The next message, or None after `timeout` seconds; None waits as long as the watchdog lets it. Raises BadMessage."""
        if not self.socket.poll(None if timeout is None else int(timeout * 1000)):
            return None
        return decode(self.socket.recv_multipart())

    def send(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))
