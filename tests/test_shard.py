"""Who holds what."""

from math import gcd

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.layout import Rows
from runtime.quantize.int4 import quantize
from runtime.shard import CannotShard, Span, head_shares, segments, spans, vocabulary_spans


@given(st.integers(1, 5000), st.sampled_from([1, 16, 32, 64, 128]), st.integers(1, 9))
def test_spans_cover_everything_once_in_whole_units(total: int, unit: int, size: int) -> None:
    units = -(-total // unit)
    if units < size:
        with pytest.raises(CannotShard, match=rf"set parallel.tensor to {units} or less"):
            spans(total, unit, size)
        return
    found = spans(total, unit, size)
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])] and found[-1].stop == total
    assert all(s.start % unit == 0 and s.width > 0 for s in found)
    widths = [-(-s.width // unit) for s in found]
    assert max(widths) - min(widths) <= 1


@given(st.integers(1, 5000), st.sampled_from([1, 16, 32, 128]), st.sampled_from([1, 2, 4, 8]), st.data())
def test_ranks_have_whole_branches_of_segments(total: int, unit: int, size: int, data: st.DataObject) -> None:
    parts = segments(lambda size: spans(total, unit, size))
    assert len(parts) == next(n for n in (8, 4, 2, 1) if n <= -(-total // unit))
    assume(size <= len(parts))
    each = len(parts) // size
    rank = data.draw(st.integers(0, size - 1))
    rows = Rows("down", spans(total, unit, size)[rank], parts)
    mine = parts[rank * each : (rank + 1) * each]
    assert rows.complete and rows.span == Span(mine[0].start, mine[-1].stop)
    assert [rows.span.start + border for border in rows.borders] == [part.start for part in mine[1:]]


def test_what_is_no_whole_branch_is_known() -> None:
    parts = tuple(Span(32 * i, 32 * i + 32) for i in range(8))
    assert Rows("down", Span(64, 128), parts).complete and Rows("down", Span(0, 256), parts).complete
    for span in (Span(32, 96), Span(0, 96), Span(16, 64), Span(64, 80)):
        assert not Rows("down", span, parts).complete
    assert Rows("down", Span(16, 80), parts).borders == (16, 48)


@given(st.integers(1, 16), st.integers(1, 8), st.sampled_from([8, 16, 64, 80, 128]), st.sampled_from([1, 32, 64, 128]),
       st.integers(1, 8))  # fmt: skip
def test_heads_split_where_groups_end(kv_heads: int, share: int, head_dim: int, group_size: int, size: int) -> None:
    heads = kv_heads * share
    assume(heads * head_dim % group_size == 0)
    together = group_size // gcd(head_dim, group_size)
    if -(-heads // together) < size:
        with pytest.raises(CannotShard, match=r"parallel\.tensor"):
            head_shares(heads, kv_heads, head_dim, group_size, size)
        return
    found = head_shares(heads, kv_heads, head_dim, group_size, size)
    assert [part.queries.start for part in found] == [0, *(part.queries.stop for part in found[:-1])]
    assert found[-1].queries.stop == heads
    for queries, keys in found:
        assert queries.width > 0 and queries.scaled(head_dim).start % group_size == 0
        assert keys == Span(queries.start // share, -(-queries.stop // share))  # those that are read and no more
    if kv_heads % size == 0 and share * head_dim % group_size == 0:
        assert all(part.even(share) and part.queries.width * size == heads for part in found)


def test_heads_of_few_keys_are_split_and_the_keys_repeated() -> None:
    assert head_shares(8, 2, 64, 128, 2) == [(Span(0, 4), Span(0, 1)), (Span(4, 8), Span(1, 2))]
    assert head_shares(8, 2, 64, 128, 4) == [(Span(2 * i, 2 * i + 2), Span(i // 2, i // 2 + 1)) for i in range(4)]
    assert head_shares(8, 2, 64, 1, 3) == [(Span(0, 4), Span(0, 1)), (Span(4, 6), Span(1, 2)), (Span(6, 8), Span(1, 2))]
    # A KV head's seven queries are no whole number of groups: one rank reads two.
    odd = head_shares(14, 2, 64, 128, 2)
    assert odd == [(Span(0, 6), Span(0, 1)), (Span(6, 14), Span(0, 2))] and [part.even(7) for part in odd] == [True, False]
    with pytest.raises(CannotShard, match=r"keep 2 heads together: a smaller model.group_size helps"):
        head_shares(8, 2, 64, 128, 5)
    with pytest.raises(CannotShard, match=r"query heads: 2 .* too few for 4 ranks; set parallel.tensor to 2 or less"):
        head_shares(2, 2, 128, 32, 4)


def test_vocabulary_in_sixteens() -> None:
    assert vocabulary_spans(100, 4) == [Span(0, 16), Span(16, 48), Span(48, 80), Span(80, 100)]
    assert vocabulary_spans(151936, 3)[-1].stop == 151936


@pytest.mark.parametrize("symmetric", [True, False])
def test_slices_and_quantisation_commute(symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(48, 5 * 32)
    whole = quantize(weight, 32, symmetric)
    for part in spans(160, 32, 3):
        shard = quantize(weight[:, part.start : part.stop], 32, symmetric)
        same = whole.groups(slice(part.start // 32, part.stop // 32))
        for a, b in ((shard.codes, same.codes), (shard.scale, same.scale), (shard.zero, same.zero)):
            assert torch.equal(a, b)
    for part in spans(48, 16, 2):
        shard, same = quantize(weight[slice(*part)], 32, symmetric), whole.rows(slice(*part))
        for a, b in ((shard.codes, same.codes), (shard.scale, same.scale), (shard.zero, same.zero)):
            assert torch.equal(a, b)
