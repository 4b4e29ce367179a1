"""Exchanges between the ranks of one host's CPU, through memory that they share."""

import mmap
import os
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from runtime.comm import Exchanging, PeerLost, summable
from runtime.kernels.build import load_extension

LINE = 16  # int64 words a rank's line of flags has; `csrc/shm.cpp` says what is in them
LEFT, ATTACHED, READY = 3, 4, 5
BARRIER, GATHER, REDUCE = 0, 1, 2


class SharedMemoryError(RuntimeError):
    """The memory that ranks of one host share isn't there or is too small."""


class SharedMemory:
    """Ranks of one host, through a file in memory: some microseconds an exchange, and no thread or socket.

    `name` belongs to this group alone; the file is unlinked as soon as every rank has attached. A message larger than
    `capacity` bytes goes in pieces; the file takes `2 * size * capacity` bytes. A wait ends after `timeout` seconds; signals
    wait for the end of `through`.

    Raises SharedMemoryError, PeerLost, or BuildError where the C++ extension can't be built.
    """

    def __init__(
        self, name: str, rank: int, size: int, timeout: float = 30.0, capacity: int = 1 << 20,
        directory: str = "/dev/shm",
    ) -> None:  # fmt: skip
        if not 1 <= size <= 31 or not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}: a host has 1 to 31 ranks, counted from 0")
        if not re.fullmatch(r"[\w.-]{1,200}", name):
            raise ValueError(f"{name!r} is no file name")
        load_extension()
        self.rank, self.size, self.timeout = rank, size, timeout
        self.capacity = -(-capacity // 128) * 128
        self._lost: PeerLost | None = None
        # With a core for every rank, spin for about a millisecond; else give the core to the rank that is waited for.
        self._spins = 20_000 if size <= len(os.sched_getaffinity(0)) else 20
        self._nothing = torch.empty(0, dtype=torch.uint8)
        self._path = Path(directory) / f"quasar-{os.getuid()}-{name}"
        self._bytes = size * LINE * 8 + 2 * size * self.capacity
        if rank == 0:
            self._create()
        self._attach()

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = summable(x).contiguous()
        out = torch.empty_like(x, dtype=dtype)
        step = self.capacity // x.element_size()
        if x.numel() <= step:
            self._exchange(REDUCE, x, out)
        else:
            for a, b in zip(x.view(-1).split(step), out.view(-1).split(step), strict=True):
                self._exchange(REDUCE, a, b)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        if x.nbytes <= self.capacity:
            self._exchange(GATHER, x, out)
            return out
        whole = out.view(self.size, -1).view(torch.uint8)
        for a, b in zip(
            x.view(-1).view(torch.uint8).split(self.capacity), whole.split(self.capacity, dim=1), strict=True
        ):
            piece = torch.empty((self.size, len(a)), dtype=torch.uint8)
            self._exchange(GATHER, a, piece)
            b.copy_(piece)
        return out

    def barrier(self) -> None:
        self._exchange(BARRIER, self._nothing, self._nothing)

    def close(self) -> None:
        if self._lost is None:
            self._native.leave()
            self._lost = PeerLost(f"rank {self.rank} has closed its communicator")

    def through(self, run: Exchanging) -> None:
        self._check()
        state, _ = run(self._native, self.timeout)
        if state:
            self._end(state)

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _end(self, state: int) -> None:
        """Raises PeerLost for what an exchange came to, as `csrc/shm.h` has it."""
        if state < 0:
            self._fail(f"rank {-1 - state} and rank {self.rank} exchange different things (kind or size)")
        if gone := state >> 32:
            self._fail(f"{_ranks(gone)} left the group while rank {self.rank} waited")
        self._fail(f"{_ranks(state)} did not come within {self.timeout:g} s to where rank {self.rank} waits")

    def _exchange(self, kind: int, x: Tensor, out: Tensor) -> None:
        self._check()
        if x.device.type != "cpu":
            raise ValueError(f"shared memory carries tensors of the CPU, not of {x.device}")
        end = time.monotonic() + self.timeout
        self._native.begin(x, kind)
        while True:  # in slices, so that Python's signal handlers run
            state = self._native.end(x, out, kind, min(0.2, max(0.0, end - time.monotonic())))
            if state == 0:
                return
            if state < 0 or state >> 32 or time.monotonic() >= end:
                self._end(state)

    def _fail(self, why: str) -> None:
        self._lost = PeerLost(why)
        self._native.leave()
        raise self._lost

    def _create(self) -> None:
        """Rank 0 makes the file under another name and moves it into place, over a stale one if there is one."""
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SharedMemoryError(f"cannot make a file in {fresh.parent}: {error.strerror}") from error
        try:
            os.posix_fallocate(file, 0, self._bytes)  # now, not with a bus error later
            os.replace(fresh, self._path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise SharedMemoryError(
                f"{fresh.parent} cannot hold {self._bytes / 2**20:.1f} MiB ({error.strerror}): give the container more "
                "(--shm-size, or an emptyDir with medium: Memory), or lower the capacity"
            ) from error
        finally:
            os.close(file)

    def _attach(self) -> None:
        """Maps the file and waits for all ranks. What a dead job left is given up for the file that replaces it."""
        end = time.monotonic() + self.timeout
        if not self._path.parent.is_dir():
            raise SharedMemoryError(f"{self._path.parent} is not there")
        words: Tensor | None = None
        while words is None or not words[0, READY]:
            late = time.monotonic() > end
            if words is None:
                if self._map():
                    words = self._memory.view(torch.int64)[: self.size * LINE].view(self.size, LINE)
                    taken = bool(words[self.rank, ATTACHED])
                    words[self.rank, ATTACHED] = 1
                elif late:
                    raise PeerLost(f"rank 0 did not make {self._path} within {self.timeout:g} s")
            elif self.rank == 0 and words[:, ATTACHED].all():
                self._path.unlink(missing_ok=True)
                words[0, READY] = 1
            elif self._replaced():
                words = None
            elif late and taken:
                raise SharedMemoryError(f"there is another rank {self.rank} at {self._path}: give each group its name")
            elif late:
                if self.rank == 0:
                    self._path.unlink(missing_ok=True)
                missing = sum(1 << r for r in range(self.size) if not words[r, ATTACHED])
                self._fail(f"{_ranks(missing or 1)} did not attach to {self._path} within {self.timeout:g} s")
            elif self.rank and words[0, LEFT]:
                self._fail("rank 0 left while the group was being made")
            else:
                time.sleep(0.002)
                continue
            if words is None:
                time.sleep(0.002)

    def _map(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            about = os.fstat(file)
            if about.st_size != self._bytes:
                return False
            self._identity = (about.st_dev, about.st_ino)
            self._memory = torch.frombuffer(mmap.mmap(file, self._bytes), dtype=torch.uint8)
            self._native = torch.classes.quasar.Exchange(self._memory, self.rank, self.size, self.capacity, self._spins)
        finally:
            os.close(file)
        return True

    def _replaced(self) -> bool:
        try:
            about = os.stat(self._path)
        except FileNotFoundError:
            return False
        return (about.st_dev, about.st_ino) != self._identity


def _ranks(mask: int) -> str:
    ranks = [str(r) for r in range(31) if mask >> r & 1]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)
