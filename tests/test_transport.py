"""Sockets: messages over them, who is let in, and what a rank does when its coordinator falls silent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from configs import exits
from configs.schema import CoordinationConfig
from runtime.messages import Alive, Failure, Stop
from runtime.wire import BadMessage
from workers.keys import make
from workers.transport import Client, Server, TransportError, is_local


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/socket"


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("ipc:///tmp/x", True),
        ("tcp://127.0.0.1:5555", True),
        ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://10.0.0.1:5555", False),
        ("tcp://node-0.job:5555", False),
    ],
)
def test_what_counts_as_local(address: str, local: bool) -> None:
    assert is_local(address) is local


def test_an_open_endpoint_without_keys_is_refused() -> None:
    with pytest.raises(TransportError, match=r"workers\.keys"):
        Server("tcp://0.0.0.0:0")
    with pytest.raises(TransportError, match="expected tcp://"):
        is_local("udp://x")


def test_messages_both_ways(endpoint: str) -> None:
    with Server(endpoint) as server, Client(endpoint, b"rank-3") as client:
        client.send(Failure(3, 6, "out of memory"))
        assert server.receive(5) == (b"rank-3", Failure(3, 6, "out of memory"))
        assert server.send(b"rank-3", Stop(0, "done"))
        assert client.receive(5) == Stop(0, "done")
        assert not server.send(b"rank-4", Stop(0, "done"))
        assert server.receive(0) is None


def test_a_message_that_is_none_is_named(endpoint: str) -> None:
    with Server(endpoint) as server, Client(endpoint, b"rank-0") as client:
        client.socket.send_multipart([b"\x80\x04pickle", b"more"])
        with pytest.raises(BadMessage):
            server.receive(5)


def test_curve_lets_in_its_own_keys_and_nobody_else(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make(ours), make(theirs)
    assert all(path.stat().st_mode & 0o077 == 0 for path in ours.glob("*_secret"))
    with pytest.raises(FileExistsError):
        make(ours)
    with Server("tcp://127.0.0.1:*", str(ours)) as server:
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        for name in theirs.glob("rank*"):
            (stranger / name.name).write_bytes(name.read_bytes())
        (stranger / "coordinator.key").write_bytes((ours / "coordinator.key").read_bytes())
        with (
            Client(server.address, b"rank-1", str(stranger)) as intruder,
            Client(server.address, b"rank-2", str(ours)) as friend,
        ):
            monitor = intruder.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
            intruder.send(Alive(1))
            friend.send(Alive(2))
            assert server.receive(5) == (b"rank-2", Alive(2))
            assert monitor.poll(5000), "the intruder was not turned away"
            assert server.receive(0) is None


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"coordination\.curve"):
        Server("tcp://127.0.0.1:*", str(tmp_path))


WATCHED = """
import sys, threading
from configs.schema import CoordinationConfig
from workers.heartbeat import Watchdog
watchdog = Watchdog(sys.argv[1], 7, CoordinationConfig(heartbeat=0.1, timeout=0.5, startup_timeout=0.5))
print("watched", flush=True)  # before it can end this process
watchdog.start()
threading.Event().wait(60)
"""


def watched(endpoint: str) -> subprocess.Popen[str]:
    """A process that does nothing for a minute under a watchdog."""
    command = [sys.executable, "-c", WATCHED, endpoint]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "watched\n"
    return process


def test_the_watchdog_ends_a_rank_whose_coordinator_is_silent(endpoint: str) -> None:
    process = watched(endpoint)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == exits.LOST and "rank 7" in printed and endpoint in printed


def test_the_watchdog_ends_a_rank_that_is_told_to_stop(endpoint: str) -> None:
    with Server(endpoint) as server:
        process = watched(endpoint)
        assert server.receive(10) == (b"beat-7", Alive(7))
        server.send(b"beat-7", Stop(exits.DISAGREED, "they differ"))
        _, printed = process.communicate(timeout=20)
    assert process.returncode == exits.DISAGREED and "they differ" in printed


def test_the_watchdog_ends_a_rank_whose_output_nobody_reads(endpoint: str) -> None:
    """A launcher that died took the other end of the pipe along; the rank must not live on without a watchdog."""
    process = watched(endpoint)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(20) == exits.LOST


def test_a_watchdog_that_fails_ends_its_rank() -> None:
    process = watched("nowhere://at-all")
    _, printed = process.communicate(timeout=20)
    assert process.returncode == exits.UNFORESEEN and "its watchdog failed" in printed


def test_timeout_must_leave_room_for_a_late_heartbeat() -> None:
    with pytest.raises(ValueError, match="two heartbeats"):
        CoordinationConfig(heartbeat=5, timeout=6)
