"""Heads that are held otherwise than in the model's dtype."""

import random
from pathlib import Path

import pytest
import torch
from test_model import same_bits
from tiny_models import VOCABULARY, config_of, logits_on, make, prompts, reference, save

from runtime.checkpoint import ModelError
from runtime.comm import Solo
from runtime.model import load_model
from runtime.quantize.int4 import quantize


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_8_bit_head(tied: bool, dtype: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make("qwen3", seed, tie_word_embeddings=tied)
    sequences = prompts(rng)
    save(model, tmp_path)
    config = config_of(tmp_path, dtype=dtype, lm_head="int8")
    sizes = (1, 2, 4)
    per_size = [logits_on(size, config, sequences, rng) for size in sizes]
    for found in per_size:
        for tokens, logits in zip(sequences, found, strict=True):
            wanted = reference(model, tokens)
            error = (logits.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert error < 0.03
    same_bits(load_model(config, Solo()), sequences, rng, (1, 7, 40))
    # Tied, the lookup keeps its table beside the head's codes and scales.
    size = torch.float32.itemsize if dtype == "float32" else 2
    plain = load_model(config_of(tmp_path, dtype=dtype), Solo())
    width, rows = model.config.hidden_size, -(-VOCABULARY // 16) * 16
    bytes_of_head = rows * (width + 4) - (0 if tied else VOCABULARY * width * size)
    assert load_model(config, Solo()).weight_bytes == plain.weight_bytes + bytes_of_head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_screened_head(tied: bool, dtype: str, seed: int, tmp_path: Path) -> None:
    """The likely logits are the plain head's, the largest is one of them, and the others are those of four bits."""
    rng = random.Random(seed)
    group_size, symmetric = rng.choice([32, 64]), rng.random() < 0.5
    model = make("qwen3", seed, getattr(torch, dtype), tie_word_embeddings=tied)
    sequences = prompts(rng)
    rounding = {"quantization": "none", "group_size": group_size, "symmetric": symmetric, "activations": "16bit"}
    config = config_of(save(model, tmp_path), dtype=dtype, lm_head="screened", **rounding)
    plain = config.model_copy(update={"lm_head": "16bit"})
    right = torch.cat(logits_on(1, plain, sequences, rng)).float()
    one, two, four = (torch.cat(logits_on(size, config, sequences, rng)) for size in (1, 2, 4))
    assert torch.equal(one, two) and torch.equal(one, four)
    step = torch.finfo(getattr(torch, dtype)).eps
    noise = 2 * step * right.abs() + 16 * torch.finfo(torch.float32).eps * right.square().mean().sqrt()
    off = (one.float() - right).abs()
    assert bool((off <= noise).gather(1, right.argmax(1, keepdim=True)).all())
    if dtype == "float32":
        model.lm_head.weight = torch.nn.Parameter(quantize(model.lm_head.weight.data, group_size, symmetric).dequantize())
        coarse = torch.cat([reference(model, tokens) for tokens in sequences])
        assert bool(((off <= noise) | torch.isclose(one, coarse, rtol=1e-4, atol=5e-5)).all())
        assert 0.001 < float((off <= noise).float().mean()) < 0.5  # some are refined, and by far not all
    for activations in ("16bit", "int8"):
        same_bits(load_model(config.model_copy(update={"activations": activations}), Solo()), sequences, rng, (1, 7, 40))
    without, screened = load_model(plain, Solo()), load_model(config, Solo())
    head = screened.module.get_output_embeddings().siblings.product
    assert screened.weight_bytes == without.weight_bytes + head.nbytes
    assert screened.bytes_read == without.bytes_read - head.weight.nbytes + head.nbytes


def test_a_head_with_a_bias_is_not_screened(seed: int, tmp_path: Path) -> None:
    save(make("phi", seed), tmp_path)
    with pytest.raises(ModelError, match=r"has a bias.*use int8 or 16bit"):
        load_model(config_of(tmp_path, lm_head="screened", group_size=32), Solo())
