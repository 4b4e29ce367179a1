"""Who holds what."""

from math import gcd

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.quantize.int4 import quantize
from runtime.shard import CannotShard, Span, head_spans, spans, vocabulary_spans


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
    assert max(widths) - min(widths) <= 1 and widths == sorted(widths, reverse=True)


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
    assert vocabulary_spans(100, 4) == [Span(0, 32), Span(32, 64), Span(64, 96), Span(96, 100)]
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
