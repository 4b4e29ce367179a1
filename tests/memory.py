"""Memory as the kernel sees it, of processes of their own; and models to fill it with.

Counted is anonymous memory, so that pages of the mapped files are none of it, and what the allocator keeps back is.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from runtime.checkpoint import INDEX
from runtime.skeleton import build_skeleton, weight_names

ROOT = Path(__file__).parents[1]
T = TypeVar("T")


def write(directory: Path, seed: int, **sizes: Any) -> Path:
    """A random bfloat16 model in two files, without transformers' own initialisation."""
    directory.mkdir()
    config = AutoConfig.for_model("qwen3", vocab_size=512, max_position_embeddings=128, dtype="bfloat16", **sizes)
    config.save_pretrained(directory)
    noise = (torch.randn(1 << 23, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()
    tensors = {
        name: noise[: torch.Size(shape).numel()].view(shape) + i / 512
        for i, (name, shape) in enumerate(weight_names(build_skeleton(config, torch.bfloat16)))
    }
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: x for name, x in tensors.items() if where[name] == file}, directory / file, {"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def run_alone(module: str, *words: str) -> dict[str, int]:
    """What a module, run with these words on one thread, prints last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *words]
    told = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300)
    found: dict[str, int] = json.loads(told.stdout.splitlines()[-1])
    return found


def most_during(work: Callable[[], T]) -> tuple[T, int]:
    """What it returns, and how many bytes more than before there were at the most."""
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = work()
    finally:
        done.set()
        watcher.join()
    return made, max(most, anonymous()) - before


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])
