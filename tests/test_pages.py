"""Memory in huge pages: tensors of their own, from as few mappings as they need, and gone when nobody holds them."""

import gc
import random
from pathlib import Path

import pytest
import torch

from runtime.pages import CHUNK, HUGE, LINE, Pages

SMAPS = Path("/proc/self/smaps")
linux = pytest.mark.skipif(not SMAPS.exists(), reason="Linux tells what memory is made of")


def test_tensors_are_what_was_asked_for_and_share_nothing(seed: int) -> None:
    rng, pages, held = random.Random(seed), Pages(), []
    for number in range(200):
        shape = tuple(rng.randrange(0, 40) for _ in range(rng.randrange(0, 4)))
        dtype = rng.choice([torch.uint8, torch.bfloat16, torch.float32, torch.int64])
        tensor = pages.empty(shape, dtype)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % LINE == 0
        held.append((tensor.fill_(number % 100), number % 100))
    assert all(bool((tensor == value).all()) for tensor, value in held)


def huge_mappings() -> set[str]:
    """The mappings that are to be in huge pages: they bear the flag `hg`."""
    found, name = set(), ""
    for line in SMAPS.read_text().splitlines():
        first = line.split(" ", 1)[0]
        if not first.endswith(":"):
            name = first
        elif first == "VmFlags:" and " hg" in line:
            found.add(name)
    return found


@linux
def test_mappings_are_shared_and_go_with_their_last_tensor() -> None:
    gc.collect()
    before = huge_mappings()
    pages = Pages()
    small = [pages.empty((3, 1 << 20), torch.uint8) for _ in range(4)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in small}) == 1
    large = pages.empty((CHUNK + 1,), torch.uint8)  # of its own, and untouched: it takes no memory
    assert large.data_ptr() % HUGE == 0 and len(large) == CHUNK + 1
    more = huge_mappings() - before
    if not more:
        pytest.skip("this kernel has no huge pages")
    after = pages.empty((5,), torch.uint8)
    assert after.untyped_storage().data_ptr() == small[0].untyped_storage().data_ptr()
    del pages, large, after
    gc.collect()
    assert len(huge_mappings() - before) >= 1 and bool((small[0].fill_(7) == 7).all())
    small.clear()
    gc.collect()
    assert huge_mappings() <= before
