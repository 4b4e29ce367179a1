"""The output file, which is also the journal: a row that stands in it is finished and on disk, whatever happens next.

Rows are appended and never touched again. Beside the output lies a sidecar, `OUT.job`, that says which job the rows
belong to; it is written before the first of them. A process that dies in the middle of a row leaves a torn last line,
which the next one cuts off and computes again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from launcher.atomic import sync_directory, write_whole
from launcher.batch import Scan

FORMAT = 1
ROW_ID = re.compile(r"quasar-([0-9]{8,19})", re.ASCII)


class JournalError(Exception):
    """The output cannot be read or written; the message names the file and says why."""


class OutputInUse(JournalError):
    """Another job that is still running writes to this output."""


class ForeignOutput(JournalError):
    """The output holds the results of something else; the message says what differs and what to do."""


class TornRow(JournalError):
    """A line that is no row stands before others, so it was not this program that broke off there."""


class DuplicateRow(JournalError):
    """A request has a second row."""


def row_id(index: int) -> str:
    """The `id` of the row of request `index`."""
    return f"quasar-{index:08d}"


class Journal:
    """Which requests of a job are finished, at one bit each, and the file that proves it; see `Journal.open`."""

    def __init__(self, path: Path, descriptor: int, num_requests: int) -> None:
        self.path, self.num_requests = path, num_requests
        self.resumed = 0  # rows that were there already
        self.failed = 0  # rows that hold an error, of this run and the ones before
        self._descriptor = descriptor
        self._bits = bytearray((num_requests + 7) // 8)
        self._num_done = 0
        self._size = 0
        self._broken: str | None = None

    @classmethod
    def open(cls, output: str | Path, scan: Scan, fingerprint: str) -> Journal:
        """Opens or makes the output of the job that runs `scan` with what `fingerprint` describes, and reads its rows.

        Raises OutputInUse, ForeignOutput, TornRow, DuplicateRow, and JournalError where the file system refuses.
        """
        path = Path(os.path.realpath(output))  # one file under two names is still one output
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise JournalError(f"cannot open the output {output}: {error.strerror}") from error
        journal = cls(path, descriptor, len(scan))
        try:
            journal._lock()
            journal._claim({"input_sha256": scan.sha256, "requests": len(scan), "fingerprint": fingerprint})
            sync_directory(path.parent)
            journal._read()
        except OSError as error:
            journal.close()
            raise JournalError(f"cannot use the output {path}: {error.strerror}") from error
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def sidecar(self) -> Path:
        """The file that says which job the output belongs to."""
        return self.path.with_name(self.path.name + ".job")

    @property
    def remaining(self) -> int:
        """Requests without a row."""
        return self.num_requests - self._num_done

    def done(self, index: int) -> bool:
        """Whether request `index` has its row on disk."""
        return bool(self._bits[index >> 3] >> (index & 7) & 1)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Puts rows on disk with one write and one sync; when it returns, they stay.

        Raises DuplicateRow, before anything is written, for a request that has a row; JournalError where the disk is
        full or fails, or the output was moved away. After that the journal takes no more rows, and opening it again
        repairs it.
        """
        if self._broken is not None:
            raise JournalError(self._broken)
        lines: dict[int, bytes] = {}
        failed = 0
        for row in rows:
            index = self._index(row.get("id"), "a new row")
            if self.done(index) or index in lines:
                raise DuplicateRow(f"request {index} has a row in {self.path} already")
            # Plain ASCII: no reader, whatever it takes for the end of a line, sees other lines than these.
            lines[index] = json.dumps(row, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
            failed += row.get("error") is not None
        if not lines:
            return
        data = b"".join(lines.values())
        try:
            write_all(self._descriptor, data)
            os.fsync(self._descriptor)
            self._check_place()
        except OSError as error:
            self._broken = f"cannot write to {self.path}: {error.strerror}; {self.remaining} requests have no row yet"
            # What of the rows did get there is cut off again; if that fails too, the next `open` does it.
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise JournalError(self._broken) from error
        self._size += len(data)
        self.failed += failed
        for index in lines:
            self._mark(index)

    def close(self) -> None:
        """Lets go of the output, so that another process may have it. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._broken = self._broken or f"{self.path} is closed"

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Holds the output until it is closed, by the end of the process at the latest. Raises OutputInUse."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputInUse(f"another job is writing to {self.path}; wait for it, or give another output") from error

    def _claim(self, job: dict[str, Any]) -> None:
        """Makes the sidecar, or checks that the one there speaks of this job. Raises ForeignOutput."""
        wanted = {"version": FORMAT, **job}
        advice = f"give another output, or delete {self.path} and {self.sidecar.name} beside it to start over"
        if not self.sidecar.exists():
            if os.fstat(self._descriptor).st_size:
                raise ForeignOutput(f"{self.path} is not empty, and no {self.sidecar.name} says whose it is; {advice}")
            write_whole(self.sidecar, json.dumps(wanted, indent=2).encode() + b"\n")
            return
        try:
            found = from_json(self.sidecar.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ForeignOutput(f"{self.sidecar} is not a job's description; {advice}")
        differences = [
            f"{key} was {found.get(key)!r} and is {value!r}" for key, value in wanted.items() if found.get(key) != value
        ]
        if differences:
            raise ForeignOutput(f"{self.path} holds results of another job: {'; '.join(differences)}; {advice}")

    def _read(self) -> None:
        """Marks the rows that are there, one line in memory at a time, and cuts off a torn last one."""
        size = os.fstat(self._descriptor).st_size
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                row = whole_row(line)
                if row is None:
                    if self._size + len(line) < size:
                        raise TornRow(f"{self.path}: line {number} is no row, and others follow it; remove it by hand")
                    break
                index = self._index(row.get("id"), f"line {number}")
                if self.done(index):
                    raise DuplicateRow(f"{self.path}: line {number} is a second row of request {index}")
                self._mark(index)
                self._size += len(line)
                self.failed += row.get("error") is not None
        if self._size < size:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
        self.resumed = self._num_done

    def _index(self, name: Any, where: str) -> int:
        """The request that an `id` speaks of. Raises JournalError for one that is none or not of this job."""
        match = ROW_ID.fullmatch(name) if isinstance(name, str) else None
        if match is None or int(match[1]) >= self.num_requests:
            raise JournalError(f"{self.path}: {where} has the id {name!r}, which names no request of this job")
        return int(match[1])

    def _mark(self, index: int) -> None:
        self._bits[index >> 3] |= 1 << (index & 7)
        self._num_done += 1

    def _check_place(self) -> None:
        """Raises OSError where the rows went to a file that nobody will find under the output's name."""
        here, there = os.fstat(self._descriptor), os.stat(self.path)
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise FileNotFoundError(0, "the file was moved or replaced while the job ran")


def whole_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None for one that is torn: cut short, or not what was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of it; a write that was cut short goes on, so that the reason becomes an error. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
