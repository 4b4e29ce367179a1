"""The first Falcons: every way in which their heads share keys and values, and their blocks the residual."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import same_bits
from tiny_models import VOCABULARY, config_of, logits_on, on_ranks, prompts, reference, save
from transformers import AutoModelForCausalLM, FalconConfig, PreTrainedModel

from runtime.checkpoint import ModelError
from runtime.model import load_model
from runtime.quantize.layer import Recipe
from runtime.quantize.stream import quantize_model
from runtime.skeleton import build_config, build_skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "7B": {"multi_query": True},
    "40B": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "11B": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "keys for every head": {"multi_query": False, "parallel_attn": False, "bias": True},
}


def made(seed: int, **changes: Any) -> PreTrainedModel:
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, ffn_hidden_size=160,
        max_position_embeddings=128, **changes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape) * (0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
            weight.data = noise + (1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0)
        model.tie_weights()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = made(seed, **KINDS[kind])
    save(model, tmp_path)
    sequences = prompts(rng, 3)
    for size in (1, 2, 3, 4):
        for tokens, logits in zip(sequences, logits_on(size, config_of(tmp_path), sequences, rng), strict=True):
            torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("quantization", "dtype"), [("int4", "bfloat16"), ("none", "bfloat16"), ("none", "float32")])
def test_neither_other_rows_nor_ranks_show(quantization: str, dtype: str, seed: int, tmp_path: Path) -> None:
    save(made(seed, **KINDS["40B"]), tmp_path)
    config = config_of(tmp_path, quantization=quantization, dtype=dtype, group_size=32)
    sequences = prompts(random.Random(seed), 3)
    on_ranks(2, lambda comm: same_bits(load_model(config, comm), sequences, random.Random(seed), (1, 7, 40)))
    one, four = (logits_on(size, config, sequences, random.Random(seed)) for size in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize("kind", ["7B", "40B"])
def test_it_is_quantised_with_calibration(kind: str, seed: int, tmp_path: Path) -> None:
    source = save(made(seed, **KINDS[kind]), tmp_path / "plain")
    windows = torch.randint(0, VOCABULARY, (6, 30), generator=torch.Generator().manual_seed(seed))
    wanted = logits_on(1, config_of(source), windows.tolist(), random.Random(seed))
    errors = []
    for method in ("rtn", "gptq"):
        quantize_model(source, tmp_path / method, Recipe(method, 32, True), None if method == "rtn" else windows)  # type: ignore[arg-type]
        config = config_of(tmp_path / method, quantization="int4", activations="16bit")
        found = logits_on(2, config, windows.tolist(), random.Random(seed))
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)))
    assert errors[1] < errors[0]


def test_alibi_is_refused_by_name(tmp_path: Path) -> None:
    FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, alibi=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="alibi"):
        build_skeleton(build_config(tmp_path), torch.float32)
