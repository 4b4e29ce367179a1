"""Times an all-reduce between ranks of this host: shared memory beside gloo.

python -m bench.comm --ranks 2
"""

import argparse
import socket
import time
import uuid

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.tables import table
from runtime.comm import Communicator
from runtime.shared_memory import SharedMemory
from runtime.torch_group import TorchGroup

SIZES = [4 << 10, 16 << 10, 64 << 10, 160 << 10, 512 << 10]


def times(comm: Communicator, size: int, dtype: torch.dtype, repeats: int) -> list[float]:
    """Microseconds of each all-reduce of `size` bytes, sorted."""
    x = torch.randn(size // dtype.itemsize).to(dtype)
    result = []
    for turn in range(repeats + 20):
        start = time.perf_counter()
        comm.all_reduce(x)
        if turn >= 20:
            result.append((time.perf_counter() - start) * 1e6)
    return sorted(result)


def rank_main(rank: int, ranks: int, name: str, port: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    world = TorchGroup(dist.group.WORLD)
    groups: dict[str, Communicator] = {"shared memory": SharedMemory(name, rank, ranks), "gloo": world}
    lines = []
    for size in SIZES:
        line = [f"{size >> 10} KB"]
        for label, comm in groups.items():
            for dtype in (torch.float32, torch.bfloat16):
                t = times(comm, size, dtype, repeats if label != "gloo" else max(50, repeats // 20))
                line.append(f"{t[len(t) // 10]:.0f} / {t[len(t) // 2]:.0f} / {t[len(t) * 99 // 100]:.0f}")
        lines.append(line)
    if rank == 0:
        print(f"{ranks} ranks, microseconds: the 10th, 50th and 99th percentile of {repeats} (gloo: fewer)\n")
        print(table(["message", *(f"{g}, {d}" for g in groups for d in ("fp32", "bf16"))], lines))
    groups["shared memory"].close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (options.ranks, uuid.uuid4().hex, port, options.repeats)
    mp.start_processes(rank_main, args=arguments, nprocs=options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
