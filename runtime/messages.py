"""What the coordinator and the ranks say to each other, and how it is written on the wire.

A message is a frozen dataclass. On the wire it is one msgpack map - version, kind, fields - followed by one raw frame per
array, so that arrays are never copied into an encoder. Everything is checked on arrival; nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Frames
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray

from runtime.costs import Costs, Effort
from runtime.logprobs import Logprobs
from runtime.request import SpeculationStats
from runtime.sequence import Sampling
from runtime.verify import Decision, Floats, Ints

VERSION = 1
DTYPES = {"<i4": np.dtype(np.int32), "<f4": np.dtype(np.float32)}


class BadMessage(Exception):
    """Bytes that are not a message of this version."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Rank -> coordinator, once its model is loaded.

    `digest` covers all settings, `fingerprint` only what decides which tokens come. `num_blocks` is what its KV cache holds.
    `lookups` counts the sources of drafts that find something now and then, `chains` says whether one more always does;
    `costs` is what rounds took, where numbers of drafts are to be chosen; `even` says that rounds are as wide as their longest
    draft.
    """

    rank: int
    group: int
    digest: str
    num_blocks: int
    max_model_len: int
    vocab_size: int
    end_tokens: list[int]
    fingerprint: str = ""
    lookups: int = 0
    chains: bool = False
    even: bool = False
    costs: Costs | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence to take up: the fields of `runtime.sequence.Sequence`, its tokens so far included.

    `num_computed` is more than 0 where its first blocks are shared with another copy, which has computed them.
    """

    index: int
    slot: int
    tokens: list[int]
    num_prompt: int
    limit: int
    ends: list[int]
    sampling: Sampling
    copy: int = 0
    num_computed: int = 0
    premature: list[int] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """Coordinator -> every rank of a group: what changes, then `rounds` rounds to run.

    Applied in this order: `decision` (the last round's, under merge: coordinator), `release` (slots), `admit`,
    `tables` (slot -> all of its blocks, for the slots whose blocks changed), `allowances` (slot -> the most drafts by source,
    likewise), which hold for all rounds of the plan.
    """

    number: int
    rounds: int
    decision: Decision | None
    release: list[int]
    admit: list[Admission]
    tables: dict[int, list[int]]
    allowances: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Rank -> coordinator under merge: coordinator: the best of its slice of the vocabulary for every row of a round.

    slots, decides, num_drafts: int32 [S]; drafts: int32 [sum of num_drafts]; scores float32 and ids int32 [R], where a
    sequence that decides has `num_drafts + 1` rows. `logprobs` comes from the group's first rank alone, of all rows that
    ask: those of drafts that will not stand are written over when their position is decided. sources: int32 [S], where the
    drafts came from, 0 for nowhere, -1 where nobody asked.
    """

    rank: int
    plan: int
    slots: Ints
    decides: Ints
    num_drafts: Ints
    drafts: Ints
    scores: Floats
    ids: Ints
    logprobs: Logprobs | None = None
    sources: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Rank -> coordinator under merge: group: what the group decided in a round, or only that it did the same.

    `digest` covers all rounds up to this one. `decision` and `logprobs` (as in a verdict) come from the group's first rank
    alone. `sources` as in a verdict. `last` ends the plan, which may come before its rounds are used up when no
    sequence has work left.
    """

    rank: int
    plan: int
    digest: bytes
    last: bool
    decision: Decision | None
    logprobs: Logprobs | None = None
    sources: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life, either way; `rank` is -1 from the coordinator."""

    rank: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Rank -> coordinator: this rank cannot go on. `code` is the exit code it asks for."""

    rank: int
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Coordinator -> every rank: the job is over, with exit code 0, or must end, with another."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Farewell:
    """Rank -> coordinator, its last message: seconds by part, and peak memory in bytes.

    `inner`: under certification, what speculation did for the int4 model; the group's first rank counts for the group.
    """

    rank: int
    rounds: int
    seconds: dict[str, float]
    peak_memory: int
    inner: SpeculationStats = field(default_factory=SpeculationStats)


Message = Hello | Plan | Verdict | Report | Alive | Failure | Stop | Farewell
KINDS: dict[str, type] = {c.__name__: c for c in (Hello, Plan, Verdict, Report, Alive, Failure, Stop, Farewell)}
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
