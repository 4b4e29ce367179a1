"""A sequence ends where it should, wherever in a run of tokens that is."""

from __future__ import annotations

import pytest

from runtime.sequence import Sampling, Sequence


def sequence(limit: int = 100, ends: tuple[int, ...] = ()) -> Sequence:
    return Sequence(0, 0, [1, 2, 3], 3, limit, frozenset(ends), Sampling())


@pytest.mark.parametrize(
    ("limit", "ends", "tokens", "kept", "reason"),
    [
        (100, (9,), [4, 5], [4, 5], None),
        (100, (9,), [4, 9, 5], [4, 9], "stop"),
        (100, (9,), [9], [9], "stop"),
        (5, (9,), [4, 5, 6], [4, 5], "length"),
        (5, (9,), [4, 9, 6], [4, 9], "stop"),  # both at once: its own end is the better reason
        (4, (), [4], [4], "length"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_commit(
    limit: int, ends: tuple[int, ...], tokens: list[int], kept: list[int], reason: str | None, at_once: bool
) -> None:
    one = sequence(limit, ends)
    runs = [tokens] if at_once else [[token] for token in tokens]
    assert [token for run in runs for token in one.commit(run)] == kept
    assert one.output == kept and one.tokens == [1, 2, 3, *kept]
    assert one.finish_reason == reason
    assert one.num_computed == one.num_committed - 1


def test_nothing_follows_the_end() -> None:
    one = sequence()
    one.finish("stop")
    assert one.commit([4]) == [] and one.output == []
