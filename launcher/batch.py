"""A batch input file: where its requests lie, that no two share a name, and that it stays the file that was scanned.

The format is OpenAI's batch input, one JSON object a line. Lines are looked at one at a time and never kept, so a
file of millions costs sixteen bytes a request.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from launcher.call import BadRequest, Call, parse, read_object
from launcher.encoder import Encoder

__all__ = ["BadRequest", "Call", "DuplicateId", "Encoder", "InputError", "Scan", "parse", "scan"]


class InputError(Exception):
    """The input file cannot be used; the message names it and says why."""


class DuplicateId(InputError):
    """Two requests have one custom_id, so nobody could tell their results apart. `lines` count from 1."""

    def __init__(self, path: Path, custom_id: str, lines: tuple[int, int]) -> None:
        super().__init__(f"{path}: custom_id {custom_id!r} stands on line {lines[0]} and again on line {lines[1]}")
        self.custom_id, self.lines = custom_id, lines


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over an input file found. `offsets[i]` is the byte at which request `i` starts."""

    path: Path
    sha256: str
    num_lines: int
    offsets: array[int] = field(repr=False)
    stamp: tuple[int, int]

    def __len__(self) -> int:
        return len(self.offsets)

    def lines(self, indices: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """The lines of these requests, read one at a time as they are asked for.

        Raises InputError where the file is no longer the one that was scanned.
        """
        try:
            with self.path.open("rb") as file:
                for index in indices:
                    if stamp(file.fileno()) != self.stamp:
                        raise InputError(f"{self.path} was changed while it was being read")
                    file.seek(self.offsets[index])
                    yield index, file.readline()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error


def scan(path: str | Path) -> Scan:
    """One pass over a batch file. Blank lines are no requests; lines that are no JSON are left for `parse` to refuse.

    Raises InputError for a file that cannot be read, and DuplicateId.
    """
    path = Path(path)
    digest, offsets, hashes = hashlib.sha256(), array("Q"), array("Q")
    position = num_lines = 0
    try:
        with path.open("rb") as file:
            before = stamp(file.fileno())
            for raw in file:
                digest.update(raw)
                if not raw.isspace():
                    offsets.append(position)
                    custom_id = custom_id_of(raw)
                    if custom_id is not None:
                        hashes.append(hash_of(custom_id))
                position += len(raw)
                num_lines += 1
            if stamp(file.fileno()) != before or before[0] != position:
                raise InputError(f"{path} was changed while it was being read")
        twice = repeated(hashes)
        if twice:
            find_duplicate(path, twice)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return Scan(path, digest.hexdigest(), num_lines, offsets, before)


def stamp(descriptor: int) -> tuple[int, int]:
    """(bytes, time of the last change) of an open file: cheap to compare, and it differs once anyone writes to it."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def custom_id_of(raw: bytes) -> str | None:
    """The name a line gives itself, however wrong the rest of it is."""
    try:
        custom_id = read_object(raw).get("custom_id")
    except BadRequest:
        return None
    return custom_id if isinstance(custom_id, str) and custom_id else None


def hash_of(custom_id: str) -> int:
    """64 bits of a name. Python's own hash will do: it is keyed afresh in every process, and these never leave one."""
    return hash(custom_id) & (2**64 - 1)


def repeated(hashes: array[int]) -> set[int]:
    """The values that occur more than once; sorts in place."""
    if not hashes:
        return set()
    values = np.frombuffer(hashes, dtype=np.uint64)
    values.sort()
    return set(values[1:][values[1:] == values[:-1]].tolist())


def find_duplicate(path: Path, twice: set[int]) -> None:
    """Raises DuplicateId for the first name that really comes twice; two names with one hash are none."""
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            custom_id = custom_id_of(raw)
            if custom_id is None or hash_of(custom_id) not in twice:
                continue
            if custom_id in seen:
                raise DuplicateId(path, custom_id, (seen[custom_id], number))
            seen[custom_id] = number
