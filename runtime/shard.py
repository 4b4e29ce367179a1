"""Who holds what: how dimensions are split over the ranks of a group. Nothing but arithmetic.

Every split is in whole units, so that a boundary never cuts a head, a quantisation group or a kernel's tile. Where the
units don't divide evenly some ranks get one more, and the splits for 1, 2, 4 and 8 ranks nest: every boundary of one is a
boundary of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from math import gcd, lcm
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


class HeadShare(NamedTuple):
    """One rank's heads of an attention block: its query heads, and the KV heads that these read."""

    queries: Span
    keys: Span

    def even(self, share: int) -> bool:
        """Whether equally many of the queries read each of the keys; `share`: queries to a KV head in the whole model."""
        return self.keys.width == 1 or self.queries == self.keys.scaled(share)


def head_shares(heads: int, kv_heads: int, width: int, group_size: int, size: int, together: int = 1) -> list[HeadShare]:
    """Splits an attention block, whose output projection has `width` inputs for each query head.

    A rank's slice of those inputs is made of whole groups of `group_size` (1: no groups), and `together` heads are never
    parted. KV heads stay whole with all their queries if there are enough of them. If not, each rank has a single KV
    head and some of its queries; and where groups don't end with KV heads, queries are cut wherever a group ends.
    Raises CannotShard.
    """
    share = heads // kv_heads
    groups = group_size // gcd(width, group_size)
    cut = lcm(groups, together)
    whole = lcm(cut, share)
    if -(-heads // whole) >= size:
        return [HeadShare(part, part.scaled(1, share)) for part in spans(heads, whole, size)]
    if kv_heads < size and share % cut == 0 and share // cut >= -(-size // kv_heads):
        return [
            HeadShare(Span(share * key + part.start, share * key + part.stop), Span(key, key + 1))
            for key, ranks in enumerate(_even(size, kv_heads))
            for part in spans(share, cut, ranks)
        ]
    try:
        parts = spans(heads, cut, size, "query heads")
    except CannotShard as error:
        if groups == 1:
            raise
        raise CannotShard(
            f"{error} (groups of {group_size} weights keep {groups} heads together: a smaller model.group_size helps)"
        ) from None
    return [HeadShare(part, Span(part.start // share, -(-part.stop // share))) for part in parts]


def _even(total: int, parts: int) -> list[int]:
    return [(part + 1) * total // parts - part * total // parts for part in range(parts)]


def output_spans(total: int, size: int, what: str) -> list[Span]:
    """Splits outputs that are put together again, in sixteens or in the largest smaller power of two that suffices."""
    return spans(total, next((unit for unit in (16, 8, 4, 2) if -(-total // unit) >= size), 1), size, what)


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
