"""Memory for what every pass reads: weights and the cache, in pages of 2 MiB where Linux has them.

Such memory is read once from end to end, so with pages of 4 KiB a core looks up an address for every 64 lines of it, and
reading waits for that; `python -m bench.pages` shows how long.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of such a page
CHUNK = 256 << 20  # bytes of addresses that are taken at a time; memory is, when it is written to
LINE = 64


class Pages:
    """Hands out tensors, one behind the other. What they lie in goes when the last of them does."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A tensor that nothing was written to, contiguous, on a line's border. Raises what torch.empty raises."""
        if torch.device(device).type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._chunk) - self._used:
            try:
                chunk = _mapped(max(CHUNK, size))
            except OSError:  # no room for that many addresses
                return torch.empty(shape, dtype=dtype)
            if size > CHUNK:
                return chunk[:size].view(dtype).view(shape)
            self._chunk, self._used = chunk, 0
        start = self._used
        self._used += -(-size // LINE) * LINE
        return self._chunk[start : start + size].view(dtype).view(shape)


def _mapped(size: int) -> Tensor:
    """uint8 [size or more], from the border of a huge page on. Raises OSError."""
    mapping = mmap.mmap(-1, size + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: small ones do the same, more slowly
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE :][: -(-size // HUGE) * HUGE]
