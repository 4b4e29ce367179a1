"""The quantiser over the families of dense models: each directory that it writes is the same model to transformers and here."""

import json
import random
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from test_stored import held
from tiny_models import VOCABULARY, config_of, logits_on, prompts, reference
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.quantization_config import CompressedTensorsConfig

from runtime.architecture import ALIASES
from runtime.checkpoint import INDEX
from runtime.comm import Solo
from runtime.quantize import layer
from runtime.quantize.grid import error_under
from runtime.quantize.int4 import Int4Weight, quantize
from runtime.quantize.layer import Recipe
from runtime.quantize.stream import quantize_model

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("unfused", "one_thread")

FAMILIES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "granite", "cohere", "cohere2",
    "glm", "glm4", "smollm3", "falcon", "starcoder2", "exaone", "exaone4", "PanguEmbedded",
]  # fmt: skip
# Each family by the method that does most, and by one of the others.
CASES = [
    (kind, method, symmetric)
    for index, (kind, other) in enumerate(zip(FAMILIES, cycle(("rtn", "gptq", "awq")), strict=False))
    for method, symmetric in ((other, index % 2 == 0), ("awq+gptq", index % 2 == 1))
    if kind in CONFIG_MAPPING or kind in ALIASES
]


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What comes out wrong of all weights that GPTQ gets, under the moments of their inputs: as it leaves them, and rounded
    to nearest."""
    found = {"gptq": 0.0, "rtn": 0.0}
    plain = layer.gptq

    def watched(weight: Tensor, moments: Tensor, group_size: int, symmetric: bool, **more: Any) -> Int4Weight:
        made = plain(weight, moments, group_size, symmetric, **more)
        found["gptq"] += error_under(moments, weight, made.dequantize())
        found["rtn"] += error_under(moments, weight, quantize(weight, group_size, symmetric).dequantize())
        return made

    monkeypatch.setattr(layer, "gptq", watched)
    return found


@pytest.mark.parametrize(("kind", "method", "symmetric"), CASES)
def test_what_is_written_is_one_model_to_all(
    kind: str, method: str, symmetric: bool, errors: dict[str, float], seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    plain, four = tmp_path / "plain", tmp_path / "four"
    plain.mkdir()
    build(kind, plain, seed)
    text = torch.randint(0, VOCABULARY, (6, 30), generator=torch.Generator().manual_seed(seed))
    quantize_model(plain, four, Recipe(method, 32, symmetric), None if method == "rtn" else text)  # type: ignore[arg-type]
    assert errors["gptq"] < errors["rtn"] if method.endswith("gptq") else not errors["rtn"]

    config = config_of(four, quantization="int4", activations="16bit")
    sequences = prompts(rng, 2)
    found = logits_on(rng.choice([1, 2, 3]), config, sequences, rng)
    ours = held(config, Solo())
    if kind in ALIASES:  # whose own code transformers would have to run
        raw = json.loads((four / "config.json").read_text())
        (four / "config.json").write_text(json.dumps(ALIASES[kind](raw)))
    model = AutoModelForCausalLM.from_pretrained(
        four, quantization_config=CompressedTensorsConfig(run_compressed=False), dtype="float32", attn_implementation="eager"
    ).eval()
    names = json.loads((four / INDEX).read_text())["weight_map"]
    assert sum(name.endswith(".weight_packed") for name in names) == len(ours) - ("lm_head" in ours)
    for path, weight in ours.items():
        torch.testing.assert_close(weight, model.get_submodule(path).weight.data.float(), rtol=1e-6, atol=0)
    for tokens, logits in zip(sequences, found, strict=True):
        torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=5e-5)
