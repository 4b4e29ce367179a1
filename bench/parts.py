"""A long measurement in parts, of which none takes another along, and whose output is in a file as soon as it is written."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from typing import TextIO


def attempt(what: str, part: Callable[[], None]) -> bool:
    """Runs a part; one that fails, or lacks a package, says so and takes none of the others along."""
    try:
        part()
    except ModuleNotFoundError as error:
        print(f"\n{what} left out: {error.name} isn't installed", flush=True)
        return False
    except Exception:
        print(f"\n{what} failed:\n{traceback.format_exc()}", flush=True)
        return False
    return True


class Tee(io.TextIOBase):
    """Writes to several streams, at once, so that nothing is lost if time runs out."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()
        return len(text)
