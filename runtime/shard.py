"""Who holds what: how dimensions are split over the ranks of a group. Nothing but arithmetic.

Every split is in whole units, so that a boundary never cuts a head, a quantisation group or a kernel's tile. Where the
units don't divide evenly some ranks get one more, and the splits for 1, 2, 4 and 8 ranks nest: every boundary of one is a
boundary of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from math import gcd
from typing import NamedTuple

VOCABULARY_UNIT = 16


class CannotShard(ValueError):
    """A model has fewer parts than the group has ranks; the message says what to change."""


class Span(NamedTuple):
    """The half-open range start..stop of a dimension."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    def scaled(self, numerator: int, denominator: int = 1) -> Span:
        """The same share of a dimension that is numerator / denominator times as long."""
        return Span(self.start * numerator // denominator, self.stop * numerator // denominator)


def spans(total: int, unit: int, size: int, what: str = "dimension") -> list[Span]:
    """Splits 0..total over `size` ranks in units; the last unit may be shorter. Raises CannotShard."""
    units = -(-total // unit)
    if units < size:
        raise CannotShard(
            f"{what}: {total} in units of {unit} gives {units} part{'s' * (units != 1)}, too few for {size} ranks; "
            f"set parallel.tensor to {units} or less"
        )
    edges = [min(total, unit * (rank * units // size)) for rank in range(size + 1)]
    return [Span(first, last) for first, last in pairwise(edges)]


def head_spans(kv_heads: int, inputs: int, group_size: int, size: int) -> list[Span]:
    """Splits the KV heads of an attention block, whose output projection has `inputs` inputs.

    A rank's slice of those inputs is made of whole groups of `group_size` (1: no groups), so several heads stay
    together where one head's inputs are no whole number of groups. Raises CannotShard.
    """
    width = inputs // kv_heads
    together = group_size // gcd(width, group_size)
    try:
        return spans(kv_heads, together, size, "KV heads")
    except CannotShard as error:
        if together == 1:
            raise
        raise CannotShard(
            f"{error} (groups of {group_size} weights keep {together} heads together: a smaller model.group_size helps)"
        ) from None


def segments(split: Callable[[int], Sequence[Span]]) -> tuple[Span, ...]:
    """The segments in which a dimension is summed, by how it is split over a number of ranks.

    They are the shares that 8 ranks would have, or 4, 2 or 1 where there are too few parts: so 1, 2, 4 or 8 ranks have
    whole segments each, as many as the others, and a binary tree over the segments has a branch for every rank.
    """
    for size in (8, 4, 2):
        with suppress(CannotShard):
            return tuple(split(size))
    return tuple(split(1))


def vocabulary_spans(total: int, size: int) -> list[Span]:
    """Splits a vocabulary in multiples of 16. Raises CannotShard."""
    return spans(total, VOCABULARY_UNIT, size, "vocabulary")
