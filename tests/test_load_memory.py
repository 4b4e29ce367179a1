"""What a rank holds while it loads: its packed shard, and less than one source tensor beside it.

Each load is a process of its own, which reads a small model first to have everything imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from runtime.model import load_model
from tests.memory import most_during, run_alone, write
from tests.tiny_models import on_ranks

SIZES = {
    "hidden_size": 1024, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
LARGEST = 2 * SIZES["hidden_size"] * SIZES["intermediate_size"]  # bytes of a source tensor
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"quantization": "int4"}),
    (1, {"quantization": "none"}),
    (2, {"quantization": "int4", "symmetric": False, "group_size": 32}),
]  # ranks, and what else is configured


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model of one layer, and one of about 200 MB."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = enumerate({"small": 1, "large": 4}.items())
    return [write(folder / name, seed, num_hidden_layers=layers, **SIZES) for seed, (name, layers) in sizes]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("size", "changes"), CASES)
def test_a_rank_holds_its_shard_and_one_source_tensor(size: int, changes: dict[str, Any], models: list[Path]) -> None:
    found = run_alone("tests.test_load_memory", *map(str, models), str(size), json.dumps(changes))
    whole = sum(path.stat().st_size for path in models[1].glob("*.safetensors"))
    assert found["held"] > whole / (1.1 if changes["quantization"] == "none" else 6), found
    assert found["peak"] <= found["held"] + size * LARGEST, found


def measure(small: str, large: str, size: int, changes: dict[str, Any]) -> dict[str, int]:
    """Loads both models on ranks that are threads. Returns bytes: of the weights held, and the most that there were in all."""
    on_ranks(size, lambda comm: load_model(ModelConfig(target=small, **changes), comm))
    loaded, peak = most_during(lambda: on_ranks(size, lambda comm: load_model(ModelConfig(target=large, **changes), comm)))
    return {"held": sum(model.weight_bytes for model in loaded), "peak": peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))))
