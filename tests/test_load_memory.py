"""What a rank holds while it loads: its packed shard, and less than one source tensor beside it.

Counted is anonymous memory as the kernel sees it, so that pages of the mapped files are none of it, and what the
allocator keeps back is. Each load is a process of its own, which reads a small model first to have everything imported.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from configs.schema import ModelConfig
from runtime.checkpoint import INDEX
from runtime.model import load_model
from runtime.skeleton import build_skeleton, weight_names
from tests.tiny_models import on_ranks

ROOT = Path(__file__).parents[1]
SIZES = {
    "hidden_size": 1024, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 128,
}  # fmt: skip
LARGEST = 2 * SIZES["hidden_size"] * SIZES["intermediate_size"]  # bytes of a source tensor
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"quantization": "int4"}),
    (1, {"quantization": "none"}),
    (2, {"quantization": "int4", "symmetric": False, "group_size": 32}),
]  # ranks, and what else is configured


def write(directory: Path, layers: int, seed: int) -> Path:
    """A random bfloat16 model in two files, without transformers' own initialisation."""
    directory.mkdir()
    config = AutoConfig.for_model("qwen3", num_hidden_layers=layers, vocab_size=512, dtype="bfloat16", **SIZES)
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model of one layer, and one of about 200 MB."""
    folder = tmp_path_factory.mktemp("memory")
    return [write(folder / "small", 1, 0), write(folder / "large", 4, 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("size", "changes"), CASES)
def test_a_rank_holds_its_shard_and_one_source_tensor(size: int, changes: dict[str, Any], models: list[Path]) -> None:
    words = [sys.executable, "-m", "tests.test_load_memory", *map(str, models), str(size), json.dumps(changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(told.stdout.splitlines()[-1])
    whole = sum(path.stat().st_size for path in models[1].glob("*.safetensors"))
    assert found["held"] > whole / (1.1 if changes["quantization"] == "none" else 6), found
    assert found["peak"] <= found["held"] + size * LARGEST, found


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def measure(small: str, large: str, size: int, changes: dict[str, Any]) -> dict[str, int]:
    """Loads both models on ranks that are threads. Returns bytes: of the weights held, and the most that there were in all."""
    on_ranks(size, lambda comm: load_model(ModelConfig(target=small, **changes), comm))
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = on_ranks(size, lambda comm: load_model(ModelConfig(target=large, **changes), comm))
    done.set()
    watcher.join()
    return {"held": sum(model.weight_bytes for model in loaded), "peak": max(most, anonymous()) - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))))
