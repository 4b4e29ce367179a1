"""What quantising holds: a few layers in float32, however many there are.

A process of its own quantises a small model first, to have everything imported, and then a deep one.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from runtime.quantize.layer import Recipe
from runtime.quantize.stream import quantize_model
from tests.memory import most_during, run_alone, write

LAYERS = 24
SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
LAYER = 4 * SIZES["hidden_size"] * (4 * SIZES["hidden_size"] + 3 * SIZES["intermediate_size"])  # bytes in float32


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_layer_is_held_and_not_the_model(tmp_path: Path) -> None:
    write(tmp_path / "small", 0, num_hidden_layers=1, **SIZES | {"hidden_size": 64, "intermediate_size": 64})
    write(tmp_path / "large", 1, num_hidden_layers=LAYERS, **SIZES)
    found = run_alone("tests.test_quantize_memory", str(tmp_path))
    assert LAYER < found["peak"] < LAYERS * LAYER / 3, found


def measure(folder: Path) -> dict[str, int]:
    """Quantises both models. Returns bytes: the most that the second took."""
    recipe = Recipe("rtn", 32, True)
    quantize_model(folder / "small", folder / "small-int4", recipe, None)
    return {"peak": most_during(lambda: quantize_model(folder / "large", folder / "large-int4", recipe, None))[1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]))))
