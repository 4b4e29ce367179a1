"""Memory of one node's GPUs that their ranks read from each other, for sums too small for a library's protocol."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.torch_group import WHOLE


class PeerMemoryError(RuntimeError):
    """The ranks of a group cannot read each other's memory; says why."""


class PeerMemory:
    """torch's symmetric memory: a buffer of every rank, mapped by all.

    An exchange is a copy, a barrier between the devices, and reads; nothing of it asks the host, so it can be part of a CUDA
    graph. torch's own one-shot sum adds in the same pattern and in bfloat16; here the ranks read and add by themselves, in
    float32 and in one order, so that a sum doesn't depend on its size. Raises PeerMemoryError.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        try:
            from torch.distributed import _symmetric_memory as symmetric

            self._buffer = symmetric.empty(WHOLE, dtype=torch.uint8, device=device)
            self._handle = symmetric.rendezvous(self._buffer, process_group)
        except (ImportError, RuntimeError) as error:
            raise PeerMemoryError(f"symmetric memory cannot be had: {error}") from error
        self._size = dist.get_world_size(process_group)

    def parts(self, x: Tensor) -> Tensor:
        """[...] of at most WHOLE bytes -> [size, ...], in rank order."""
        x = x.contiguous()
        self._buffer[: x.nbytes].copy_(x.view(-1).view(torch.uint8))
        self._handle.barrier()  # everyone has written
        parts = torch.stack([self._handle.get_buffer(rank, x.shape, x.dtype) for rank in range(self._size)])
        self._handle.barrier()  # everyone has read
        return parts


def others(device: torch.device) -> list[int]:
    """The node's other GPUs."""
    return [peer for peer in range(torch.cuda.device_count()) if peer != device.index]


def chosen(wanted: str, device: torch.device, one_host: bool) -> bool:
    """Whether a group sums small tensors through peers' memory: `parallel.all_reduce`, and whether they can be peers.

    Raises PeerMemoryError where it is asked for and impossible.
    """
    reason = None
    if device.type != "cuda":
        reason = f"it is for GPUs, and this rank runs on {device.type}"
    elif not one_host:
        reason = "the group's ranks are on several hosts"
    elif not all(torch.cuda.can_device_access_peer(device.index, peer) for peer in others(device)):
        reason = "the node's GPUs cannot read each other's memory"
    if wanted == "symmetric" and reason is not None:
        raise PeerMemoryError(f"parallel.all_reduce is symmetric, and {reason}; set it to auto or nccl")
    return wanted != "nccl" and reason is None
