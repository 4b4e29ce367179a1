"""Host memory that a device reads and writes while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the host's, of any content; `copy_(..., non_blocking=True)` between it and the device doesn't wait.

    It may be forgotten at once: torch's allocator gives its memory to nobody before such copies are done.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
