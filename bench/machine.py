"""The machine that a benchmark runs on: what it is, and how fast it reads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

READ = """
import sys, time, torch
from runtime.pages import Pages
torch.set_num_threads(int(sys.argv[1]))
x = Pages().empty((1 << 28,), torch.float32).fill_(1.0)
best = float("inf")
for _ in range(8):
    start = time.perf_counter(); x.sum(); best = min(best, time.perf_counter() - start)
print(x.nbytes / best)
"""


def read_bandwidth(threads: int) -> float:
    """Bytes a second: the best of eight sums over 1 GiB in huge pages, in a process of its own, which takes some seconds."""
    done = subprocess.run([sys.executable, "-c", READ, str(threads)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def describe() -> str:
    """The processor, its cores and the version of torch."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores, torch {torch.__version__}"
