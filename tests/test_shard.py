"""Who holds what."""

from math import gcd

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.layout import Rows
from runtime.quantize.int4 import quantize
from runtime.shard import CannotShard, Span, head_spans, segments, spans, vocabulary_spans


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
    inputs = kv_heads * share * head_dim
    assume(inputs % group_size == 0)
    together = group_size // gcd(share * head_dim, group_size)
    if -(-kv_heads // together) < size:
        with pytest.raises(CannotShard, match=r"parallel\.tensor"):
            head_spans(kv_heads, inputs, group_size, size)
        return
    found = head_spans(kv_heads, inputs, group_size, size)
    assert found[-1].stop == kv_heads
    for heads in found:
        part = heads.scaled(inputs, kv_heads)
        assert part.start % group_size == 0 and part.stop % group_size == 0
        assert part.width == heads.width * share * head_dim


def test_heads_that_groups_keep_together() -> None:
    assert head_spans(4, 4 * 64, 128, 2) == [Span(0, 2), Span(2, 4)]
    with pytest.raises(CannotShard, match=r"2 heads together: a smaller model.group_size helps"):
        head_spans(4, 4 * 64, 128, 4)
    with pytest.raises(CannotShard, match=r"KV heads: 2 .* too few for 4 ranks; set parallel.tensor to 2 or less"):
        head_spans(2, 256, 32, 4)


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
