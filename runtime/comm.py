"""How the ranks of a group exchange tensors. A sum has the same bits on every rank."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

SUMMED = (torch.float32, torch.bfloat16, torch.float16)


class PeerLost(RuntimeError):
    """A rank of the group did not come, left, or sent something else than the others; the communicator is over."""


# C++ that exchanges by itself as often as it likes, through `csrc/shm.h`'s object, or None where there is nobody to exchange
# with, and a timeout -> what the last exchange came to, and the seconds all of them took.
Exchanging = Callable[[Any, float], tuple[int, float]]
Through = Callable[[Exchanging], None]


class Communicator(Protocol):
    """The ranks of one group. Every rank calls the same methods in the same order with the same shapes.

    through: for many exchanges without coming back to Python; None where that can't be. Raises PeerLost.
    """

    rank: int
    size: int

    @property
    def through(self) -> Through | None: ...

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[...] float32, bfloat16 or float16 -> the same shape, of `dtype` or else x's, summed over the ranks.

        Added in float32 as a binary tree over the ranks, ((0 + 1) + (2 + 3)) + ..., and rounded once. Raises PeerLost;
        ValueError for other dtypes.
        """

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] of any dtype -> [size, ...], in rank order. Raises PeerLost."""

    def barrier(self) -> None:
        """Returns when every rank has called it. Raises PeerLost."""

    def close(self) -> None:
        """Ends this rank's part; the others get PeerLost if they still wait for it. Can be called twice."""


class Solo:
    """A group of one."""

    rank = 0
    size = 1

    def through(self, run: Exchanging) -> None:
        run(None, 0.0)

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return summable(x).to(dtype or x.dtype, copy=True)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.clone()[None]

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


def summable(x: Tensor) -> Tensor:
    """The tensor itself. Raises ValueError unless `all_reduce` takes its dtype."""
    if x.dtype not in SUMMED:
        raise ValueError(f"all_reduce takes float32, bfloat16 or float16, not {x.dtype}")
    return x
