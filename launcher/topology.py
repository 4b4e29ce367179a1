"""Who this process is among all processes of the job, whichever launcher started it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

NOTE = 512  # bytes of a text that is shared over MPI


class TopologyError(Exception):
    """The launcher's environment makes no sense; the message says which part."""


@dataclass(frozen=True, slots=True)
class Topology:
    """rank of size processes; local_rank of local_size on this host; launcher: "single", "torch" or "mpi"."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str

    def group(self, tensor: int | None) -> tuple[int, list[tuple[int, ...]]]:
        """This rank's group and the ranks of all groups, `tensor` ranks each (all in one group by default).

        Raises TopologyError if they don't come out even.
        """
        width = tensor or self.size
        if self.size % width:
            raise TopologyError(
                f"parallel.tensor is {width}, but {self.size} ranks cannot be divided into groups of {width}: "
                f"start a multiple of {width} ranks or set parallel.tensor to a divisor of {self.size}"
            )
        groups = [tuple(range(first, first + width)) for first in range(0, self.size, width)]
        return self.rank // width, groups


def discover(environment: Mapping[str, str] = os.environ) -> Topology:
    """Reads what deepspeed and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), or mpirun, have set; one process otherwise."""
    if "OMPI_COMM_WORLD_SIZE" in environment or "PMI_SIZE" in environment:
        return _from_mpi(environment)
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Topology(0, 1, 0, 1, "single")
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or size)
    except ValueError as error:
        raise TopologyError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}") from error
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise TopologyError(f"rank {rank} of {size}, local rank {local_rank} of {local_size}: these contradict each other")
    return Topology(rank, size, local_rank, local_size, "single" if size == 1 else "torch")


def _from_mpi(environment: Mapping[str, str]) -> Topology:
    from mpi4py import MPI  # importing it initialises MPI, which only a process started by mpirun should do

    world = MPI.COMM_WORLD
    announced = int(environment.get("OMPI_COMM_WORLD_SIZE") or environment["PMI_SIZE"])
    if world.size != announced:
        raise TopologyError(
            f"mpirun started {announced} processes, but mpi4py sees a world of {world.size}: "
            "mpirun and mpi4py use different MPI libraries; use OpenMPI's mpirun"
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    return Topology(world.rank, world.size, host.rank, host.size, "single" if world.size == 1 else "mpi")


class Board(Protocol):
    """Where rank 0 posts short texts that all ranks read, before any other connection exists."""

    def share(self, key: str, value: str | None) -> str:
        """Rank 0 passes the value, the others None; all get it."""


class OwnBoard:
    """Of a single process."""

    def share(self, key: str, value: str | None) -> str:
        assert value is not None, key
        return value


class StoreBoard:
    """torch's TCP store at MASTER_ADDR:MASTER_PORT, as deepspeed and torchrun set them."""

    def __init__(self, rank: int, timeout: float) -> None:
        import torch.distributed as dist

        self._rank = rank
        self.store: Any = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))[0]

    def share(self, key: str, value: str | None) -> str:
        if self._rank == 0:
            self.store.set(f"quasar/{key}", value)
        return self.store.get(f"quasar/{key}").decode()


class MPIBoard:
    """A broadcast over MPI."""

    def share(self, key: str, value: str | None) -> str:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        data = bytearray((value or "").encode().ljust(NOTE))
        world.Bcast([data, MPI.BYTE], root=0)
        return data.decode().rstrip()


def board(topology: Topology, timeout: float) -> Board:
    """The board that this job's launcher offers. Under mpirun it also makes torch's rendezvous possible."""
    if topology.launcher == "single":
        return OwnBoard()
    if topology.launcher == "torch":
        return StoreBoard(topology.rank, timeout)
    posted = MPIBoard()
    address = posted.share("master", f"{own_address(topology)} {free_port()}" if topology.rank == 0 else None)
    master, port = address.split()
    os.environ |= {"RANK": str(topology.rank), "WORLD_SIZE": str(topology.size), "MASTER_ADDR": master, "MASTER_PORT": port}
    return posted


def own_address(topology: Topology) -> str:
    """An address of this host that all ranks of the job can reach."""
    return "127.0.0.1" if topology.local_size == topology.size else socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    """A TCP port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
