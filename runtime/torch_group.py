"""Exchanges through `torch.distributed`: gloo between hosts, NCCL between GPUs."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.comm import PeerLost, summable
from runtime.kernels.folding import tree

# Its name since torch 2.13, and before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
WHOLE = 256 << 10  # bytes of a tensor up to which every rank adds up all of it


class Peers(Protocol):
    """Memory of the group's other ranks that this one can read; see `runtime.peer_memory`."""

    def parts(self, x: Tensor) -> Tensor:
        """[...] of at most WHOLE bytes -> [size, ...], in rank order."""


class TorchGroup:
    """A group of `torch.distributed`.

    The libraries' own sums are added in an order that depends on where an element stands and on how many there are. So
    ranks exchange and add by themselves: a small tensor is gathered and added up by everyone, of a large one each rank
    adds a share and tells the others. peers: by which small ones are gathered, if not by the library. loose: what peers don't
    gather the library adds, in its own order.
    The bound on waits is the process group's own timeout.
    """

    def __init__(self, process_group: dist.ProcessGroup, peers: Peers | None = None, loose: bool = False) -> None:
        self.group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._peers = peers
        self._loose = loose

    through = None

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        small = summable(x).nbytes <= WHOLE
        if small and self._peers is not None:
            return tree(list(self._peers.parts(x).float())).to(dtype)
        if self._loose:
            out = x.clone(memory_format=torch.contiguous_format)
            self._guard(lambda: dist.all_reduce(out, group=self.group))
            return out.to(dtype)
        return tree(list(self.all_gather(x).float())).to(dtype) if small else self._by_shares(x, dtype)

    def _by_shares(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Every rank gets its share of each rank's tensor, adds them, and gives the sum to all: twice the tensor travels."""
        share = -(-x.numel() // self.size)
        padded = x.new_zeros(self.size, share)
        padded.view(-1)[: x.numel()] = x.reshape(-1)
        parts = torch.empty_like(padded)
        self._guard(lambda: dist.all_to_all_single(_bytes(parts), _bytes(padded), group=self.group))
        sums = self.all_gather(tree(list(parts.float())).to(dtype))
        return sums.view(-1)[: x.numel()].view(x.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            self._guard(lambda: _gather(_bytes(out), _bytes(x), group=self.group))
        return out

    def barrier(self) -> None:
        self._guard(lambda: dist.barrier(group=self.group))

    def close(self) -> None:
        """The process group belongs to who made it."""

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} of {self.size} lost its group: {error}") from error


def _bytes(x: Tensor) -> Tensor:
    """Libraries don't know all dtypes."""
    return x.view(-1).view(torch.uint8)
