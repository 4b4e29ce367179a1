"""How messages are written on the wire.

A message is one msgpack map - version, kind, fields - followed by one raw frame per array, so that arrays are never copied
into an encoder. Everything is checked on arrival; nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Frames
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray

from runtime.costs import Costs, Effort
from runtime.logprobs import Logprobs
from runtime.messages import Admission, Message
from runtime.request import SpeculationStats
from runtime.sequence import Sampling
from runtime.verify import Decision, Floats, Ints

VERSION = 1
DTYPES = {"<i4": np.dtype(np.int32), "<f4": np.dtype(np.float32)}


class BadMessage(Exception):
    """Bytes that are not a message of this version."""


KINDS: dict[str, type] = {c.__name__: c for c in get_args(Message)}
PARTS: dict[str, type] = {
    c.__name__: c for c in (Admission, Sampling, Decision, Logprobs, SpeculationStats, Costs, Effort)
}
OPTIONAL: dict[Any, type] = {Decision | None: Decision, Logprobs | None: Logprobs, Costs | None: Costs}
HINTS = {c: get_type_hints(c) for c in (*KINDS.values(), *PARTS.values())}


def encode(message: Message) -> list[bytes]:
    """The frames of a message: a msgpack header, then one frame per array in order of appearance."""
    arrays: list[bytes] = []

    def pack(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value).tobytes())
            return {"array": value.dtype.str, "length": len(value)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"part": type(value).__name__, "fields": fields(value)}
        if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            return [pack(item) for item in value]
        return value

    def fields(value: Any) -> list[Any]:
        return [pack(getattr(value, f.name)) for f in dataclasses.fields(value)]

    header = [VERSION, type(message).__name__, fields(message)]
    return [msgpack.packb(header), *arrays]


def decode(frames: Frames[bytes]) -> Message:
    """The message in these frames. Raises BadMessage for anything else than a whole, well-typed message."""
    try:
        header = msgpack.unpackb(frames[0], strict_map_key=False)
        version, kind, values = header
    except Exception as error:  # msgpack raises half a dozen kinds
        raise BadMessage(f"the header is not a message's: {error}") from error
    if type(version) is not int or not isinstance(kind, str):  # and don't show them: they may be nested a thousand deep
        raise BadMessage("the header is not a message's: it names no version and kind")
    if version != VERSION:
        raise BadMessage(f"the peer speaks version {version} of the protocol, this side {VERSION}: install the same release")
    if kind not in KINDS:
        raise BadMessage(f"unknown kind of message {kind[:40]!r}")
    arrays = iter(frames[1:])
    message = _build(KINDS[kind], values, arrays)
    if next(arrays, None) is not None:
        raise BadMessage(f"{kind}: more frames than arrays")
    return message


def _build(cls: type, values: Any, arrays: Any) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(values, list) or len(values) != len(names):
        raise BadMessage(f"{cls.__name__}: expected {len(names)} fields")
    hints = HINTS[cls]
    return cls(**{n: _check(f"{cls.__name__}.{n}", hints[n], v, arrays) for n, v in zip(names, values, strict=True)})


def _check(name: str, hint: Any, value: Any, arrays: Any) -> Any:
    """The value as its annotation wants it. Raises BadMessage."""
    if hint in (Ints, Floats):
        return _array(name, np.int32 if hint == Ints else np.float32, value, arrays)
    if hint in OPTIONAL:
        return None if value is None else _part(name, OPTIONAL[hint], value, arrays)
    if hint in (Sampling, SpeculationStats, Effort):
        return _part(name, hint, value, arrays)
    if hint == list[Admission] and isinstance(value, list):
        return [_part(name, Admission, item, arrays) for item in value]
    if hint is float and type(value) is int:
        return float(value)
    if not _fits(hint, value):
        raise BadMessage(f"{name}: expected {hint}, got {type(value).__name__}")
    return value


def _part(name: str, cls: type, value: Any, arrays: Any) -> Any:
    if not isinstance(value, dict) or value.get("part") != cls.__name__:
        raise BadMessage(f"{name}: expected a {cls.__name__}")
    return _build(cls, value.get("fields"), arrays)


def _array(name: str, dtype: Any, value: Any, arrays: Any) -> NDArray[Any]:
    frame = next(arrays, None)
    announced, length = (value.get("array"), value.get("length")) if isinstance(value, dict) else (None, None)
    if frame is None or not isinstance(announced, str) or DTYPES.get(announced) != dtype:
        raise BadMessage(f"{name}: expected an array of {np.dtype(dtype).name}")
    if type(length) is not int or len(frame) != length * np.dtype(dtype).itemsize:
        raise BadMessage(f"{name}: {len(frame)} bytes do not make the array that was announced")
    return np.frombuffer(frame, dtype)


def _fits(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(args[0], k) and _fits(args[1], v) for k, v in value.items())
    if origin is UnionType:
        return any(_fits(arg, value) for arg in args)
    return type(value) is hint
