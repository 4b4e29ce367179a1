"""The wire: every message there and back, and every kind of damage ends in BadMessage."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.costs import Costs, Effort
from runtime.logprobs import Logprobs
from runtime.messages import Admission, Alive, Decision, Failure, Farewell, Hello, Message, Plan, Report, Stop, Verdict
from runtime.request import SpeculationStats
from runtime.sequence import Sampling
from runtime.wire import KINDS, VERSION, BadMessage, decode, encode


def some_ints(rng: random.Random, count: int) -> np.ndarray:
    return np.array([rng.randrange(-(2**31), 2**31) for _ in range(count)], np.int32)


def some_decision(rng: random.Random) -> Decision | None:
    if rng.random() < 0.3:
        return None
    return Decision(*(some_ints(rng, rng.choice([0, 1, 5])) for _ in range(4)))


def some_floats(rng: random.Random) -> np.ndarray:
    return np.array([rng.random(), -np.inf][: rng.choice([0, 2])], np.float32)


def some_logprobs(rng: random.Random) -> Logprobs | None:
    if rng.random() < 0.3:
        return None
    ints = [some_ints(rng, rng.choice([0, 1, 5])) for _ in range(5)]
    return Logprobs(*ints[:4], some_floats(rng), ints[4], some_floats(rng))


def some_message(kind: str, rng: random.Random) -> Message:
    def number() -> int:
        return rng.choice([0, 1, 127, 2**31, 2**63 - 1, rng.randrange(10**6)])

    def numbers() -> list[int]:
        return [number() for _ in range(rng.choice([0, 1, 4]))]

    text = rng.choice(["", "a", "naïve ≠ 🙂", "x" * 300])
    seed = rng.choice([-(2**63), -1, 0, 2**63 - 1])

    def sampling() -> Sampling:
        return Sampling(
            rng.random(), seed, number(), rng.random(), number(), rng.random(), rng.random(), -rng.random(), 1.5,
            {number(): rng.random() for _ in range(3)}, rng.choice([None, numbers()]), [numbers(), numbers()],
            rng.choice([None, text]), rng.choice([None, 0, 20]), rng.choice([None, 0, 20]),
        )  # fmt: skip

    def admission() -> Admission:
        return Admission(
            number(), number(), numbers(), number(), number(), numbers(), sampling(), number(), number(), numbers()
        )

    def costs() -> Costs | None:
        return rng.choice([None, Costs(numbers(), numbers(), [rng.random(), 1.0], rng.random(), 0.0)])

    def effort() -> Effort:
        return Effort(rng.random(), 0.0, number())

    makers: dict[str, Any] = {
        "Hello": lambda: Hello(
            number(), number(), text, number(), number(), number(), numbers(), text, number(), rng.random() < 0.5, False,
            costs(),
        ),
        "Plan": lambda: Plan(
            number(), number(), some_decision(rng), numbers(), [admission() for _ in range(rng.choice([0, 1, 3]))],
            {number(): numbers() for _ in range(3)}, {number(): numbers() for _ in range(3)},
        ),
        "Verdict": lambda: Verdict(
            number(), number(), *(some_ints(rng, rng.choice([0, 1, 5])) for _ in range(4)),
            some_floats(rng), some_ints(rng, 2), some_logprobs(rng), some_ints(rng, 2), effort(),
        ),
        "Report": lambda: Report(
            number(), number(), rng.randbytes(8), rng.random() < 0.5, some_decision(rng), some_logprobs(rng), some_ints(rng, 3),
            effort(),
        ),
        "Alive": lambda: Alive(rng.choice([-1, number()])),
        "Failure": lambda: Failure(number(), number(), text),
        "Stop": lambda: Stop(number(), text),
        "Farewell": lambda: Farewell(
            number(), number(), {text: rng.random(), "draft": 0.0}, number(),
            SpeculationStats(number(), numbers(), numbers(), numbers()),
        ),
    }  # fmt: skip
    message: Message = makers[kind]()
    return message


def plain(value: Any) -> Any:
    """With lists and types in place of arrays, so that == compares everything."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, plain(value.tolist())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(plain(getattr(value, f.name)) for f in dataclasses.fields(value))]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return repr(value)  # NaN is not equal to itself
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, seed: int) -> None:
    rng = random.Random(f"{seed} {kind}")
    for _ in range(50):
        message = some_message(kind, rng)
        frames = encode(message)
        assert all(isinstance(frame, bytes) for frame in frames)
        assert plain(decode(frames)) == plain(message)


def test_arrays_travel_as_frames_of_their_own() -> None:
    verdict = Verdict(0, 1, *(np.arange(1000, dtype=np.int32) for _ in range(4)), np.ones(7, np.float32), np.ones(7, np.int32))
    frames = encode(verdict)
    assert [len(frame) for frame in frames[1:]] == [4000] * 4 + [28] * 2 + [0]
    assert len(frames[0]) < 400


def test_strided_arrays_are_written_in_order() -> None:
    decision = Decision(*(np.arange(10, dtype=np.int32)[::-2] for _ in range(4)))
    report = decode(encode(Report(0, 1, b"", True, decision)))
    assert isinstance(report, Report) and report.decision is not None
    assert report.decision.tokens.tolist() == [9, 7, 5, 3, 1]


NONE = {"array": "<i4", "length": 0}
NO_SCORES = {"array": "<f4", "length": 0}
EFFORT = {"part": "Effort", "fields": [0.5, 0.0, 3]}
VERDICT = [0, 1, NONE, NONE, NONE, NONE, NO_SCORES, NONE, None, NONE, EFFORT]
HELLO = [0, 0, "", 1, 1, 1, [2], "", 4, False, False, None]
SAMPLING = {"part": "Sampling", "fields": [0.5, 0, 0, 1.0, 0, 0.0, 0.0, 0.0, 1.0, {3: 1.5}, None, [[1, 2]], None, None, 0]}
ADMISSION = {"part": "Admission", "fields": [0, 0, [1], 1, 2, [], SAMPLING, 0, 0, [2]]}
PLAN = [1, 1, None, [], [ADMISSION], {0: [1]}, {}]
REPORT = [0, 1, b"", True, None, None, NONE, EFFORT]


def frames_of(kind: Any, values: Any, arrays: int = 0, version: Any = VERSION) -> list[bytes]:
    return [msgpack.packb([version, kind, values]), *[b""] * arrays]


def changed(values: list[Any], at: int, value: Any) -> list[Any]:
    return [*values[:at], value, *values[at + 1 :]]


def sampling_with(at: int, value: Any) -> dict[str, Any]:
    return {**SAMPLING, "fields": changed(SAMPLING["fields"], at, value)}


def admission_with(sampling: Any) -> dict[str, Any]:
    return {**ADMISSION, "fields": changed(ADMISSION["fields"], 6, sampling)}


def verdict_with(**array: Any) -> list[bytes]:
    return frames_of("Verdict", changed(VERDICT, 2, {**NONE, **array}), 7)


DAMAGED: dict[str, list[bytes]] = {
    "no frames": [],
    "empty header": [b""],
    "header of another shape": [msgpack.packb([VERSION, "Alive"])],
    "header is a number": [msgpack.packb(7)],
    "header is a map": [msgpack.packb({VERSION: 1, "Alive": 2, "x": 3})],
    "bytes after the header": [*encode(Alive(1))[:0], encode(Alive(1))[0] + b"\x00"],
    "header not UTF-8": [b"\x93\x01\xa2\xff\xfe\x90"],
    "kind nested too deep to print": [b"\x93\x01" + b"\x91" * 1000 + b"\xc0\x90"],
    "version nested too deep to print": [b"\x93" + b"\x91" * 1000 + b"\xc0\xa5Alive\x91\x01"],
    "fields nested too deep": [b"\x93\x01\xa5Alive" + b"\x91" * 1000 + b"\xc0"],
    "older version": frames_of("Alive", [1], version=VERSION - 1),
    "newer version": frames_of("Alive", [1], version=VERSION + 1),
    "version is true": frames_of("Alive", [1], version=True),
    "version is text": frames_of("Alive", [1], version="1"),
    "unknown kind": frames_of("Sabotage", [1]),
    "a part as a message": frames_of("Admission", ADMISSION["fields"]),
    "kind is a list": frames_of(["Alive"], [1]),
    "missing field": frames_of("Alive", []),
    "extra field": frames_of("Alive", [1, 2]),
    "fields are a map": frames_of("Alive", {"rank": 1}),
    "fields are nothing": frames_of("Alive", None),
    "text for a number": frames_of("Alive", ["1"]),
    "true for a number": frames_of("Alive", [True]),
    "fraction for a number": frames_of("Alive", [1.0]),
    "number for text": frames_of("Stop", [0, 5]),
    "bytes for text": frames_of("Stop", [0, b"bye"]),
    "text for bytes": frames_of("Report", changed(REPORT, 2, ""), 1),
    "number for a truth": frames_of("Report", changed(REPORT, 3, 1), 1),
    "number for a list": frames_of("Hello", changed(HELLO, 6, 2)),
    "text within a list of numbers": frames_of("Hello", changed(HELLO, 6, [1, "2"])),
    "list for a map": frames_of("Plan", changed(PLAN, 5, [1])),
    "text for a key": frames_of("Plan", changed(PLAN, 5, {"0": [1]})),
    "number for a table": frames_of("Plan", changed(PLAN, 5, {0: 1})),
    "number for the admissions": frames_of("Plan", changed(PLAN, 4, 3)),
    "number for an admission": frames_of("Plan", changed(PLAN, 4, [3])),
    "admission of another part": frames_of("Plan", changed(PLAN, 4, [{**ADMISSION, "part": "Decision"}])),
    "admission without fields": frames_of("Plan", changed(PLAN, 4, [{"part": "Admission"}])),
    "admission with a field missing": frames_of("Plan", changed(PLAN, 4, [{**ADMISSION, "fields": [0]}])),
    "part's name is a list": frames_of("Plan", changed(PLAN, 4, [{**ADMISSION, "part": ["Admission"]}])),
    "admission without sampling": frames_of("Plan", changed(PLAN, 4, [admission_with(None)])),
    "sampling of another part": frames_of("Plan", changed(PLAN, 4, [admission_with({**SAMPLING, "part": "Decision"})])),
    "text for a bias": frames_of("Plan", changed(PLAN, 4, [admission_with(sampling_with(9, {3: "1"}))])),
    "text for a bias's token": frames_of("Plan", changed(PLAN, 4, [admission_with(sampling_with(9, {"3": 1.0}))])),
    "number for the allowed": frames_of("Plan", changed(PLAN, 4, [admission_with(sampling_with(10, 3))])),
    "number for a bad word": frames_of("Plan", changed(PLAN, 4, [admission_with(sampling_with(11, [3]))])),
    "fraction for a count of logprobs": frames_of("Plan", changed(PLAN, 4, [admission_with(sampling_with(12, 1.0))])),
    "logprobs are a decision": frames_of("Report", changed(REPORT, 5, {"part": "Decision", "fields": [NONE] * 4}), 5),
    "logprobs without their arrays": frames_of("Report", changed(REPORT, 5, {"part": "Logprobs", "fields": [NONE] * 7}), 7),
    "decision is a number": frames_of("Report", changed(REPORT, 4, 3), 1),
    "decision without its arrays": frames_of("Report", changed(REPORT, 4, {"part": "Decision", "fields": [NONE] * 4}), 4),
    "seconds that are text": frames_of("Farewell", [0, 1, {"draft": "long"}, 0]),
    "frame missing": frames_of("Verdict", VERDICT, 6),
    "frame too many": frames_of("Verdict", VERDICT, 8),
    "frame after a message without arrays": frames_of("Alive", [1], 1),
    "array is a list": frames_of("Verdict", changed(VERDICT, 2, [1, 2]), 7),
    "array is nothing": frames_of("Verdict", changed(VERDICT, 2, None), 7),
    "array of another type": verdict_with(array="<f4"),
    "array of a wider type": verdict_with(array="<i8"),
    "array of the other byte order": verdict_with(array=">i4"),
    "array of objects": verdict_with(array="|O"),
    "type is a list": verdict_with(array=[1]),
    "type is a map": verdict_with(array={}),
    "type is nothing": verdict_with(array=None),
    "length too long": verdict_with(length=1),
    "length negative": verdict_with(length=-1),
    "length is nothing": verdict_with(length=None),
    "length is a map": verdict_with(length={}),
    "length is text": verdict_with(length="0"),
    "length is a fraction": verdict_with(length=0.0),
    "length is false": verdict_with(length=False),
    "ragged frame": [frames_of("Verdict", VERDICT)[0], b"abc", *[b""] * 6],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(damage: str) -> None:
    with pytest.raises(BadMessage):
        decode(DAMAGED[damage])


@pytest.mark.parametrize(
    ("kind", "values", "arrays"), [("Verdict", VERDICT, 7), ("Hello", HELLO, 0), ("Plan", PLAN, 0), ("Report", REPORT, 1)]
)
def test_what_is_damaged_above_was_whole_before(kind: str, values: list[Any], arrays: int) -> None:
    decode(frames_of(kind, values, arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_named(kind: str, seed: int) -> None:
    frames = encode(some_message(kind, random.Random(f"{seed} {kind}")))
    for at, frame in enumerate(frames):
        for length in range(len(frame)):
            with pytest.raises(BadMessage):
                decode([*frames[:at], frame[:length], *frames[at + 1 :]])
    for count in range(len(frames)):
        with pytest.raises(BadMessage):
            decode(frames[:count])


def decodes_or_is_named(frames: list[bytes]) -> None:
    try:
        message = decode(frames)
    except BadMessage:
        return
    assert plain(decode(encode(message))) == plain(message)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_random_bytes(frames: list[bytes]) -> None:
    decodes_or_is_named(frames)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(kind: str, seed: int) -> None:
    rng = random.Random(f"{seed} {kind}")
    for _ in range(300):
        frames = [bytearray(frame) for frame in encode(some_message(kind, rng))]
        for _ in range(rng.randint(1, 3)):
            frames[0][rng.randrange(len(frames[0]))] = rng.randrange(256)
        decodes_or_is_named([bytes(frame) for frame in frames])


leaves = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
keys = st.sampled_from(["array", "length", "part", "fields"]) | st.integers(0, 3)
trees = st.recursive(
    leaves | st.sampled_from(["<i4", "<f4", "Admission", "Decision", "Sampling", "Logprobs"]),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(keys, children, max_size=4),
    max_leaves=15,
)


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_random_contents_of_a_known_kind(kind: str, data: st.DataObject) -> None:
    count = len(dataclasses.fields(KINDS[kind]))
    values = data.draw(st.lists(trees, min_size=count, max_size=count))
    arrays = data.draw(st.lists(st.sampled_from([b"", b"abcd", b"abcdefgh"]), max_size=6))
    decodes_or_is_named([msgpack.packb([VERSION, kind, values]), *arrays])
