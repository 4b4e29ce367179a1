"""A model made larger computes what the small one does."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, config_of, logits_on, make, prompts, reference, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.enlarge import SOURCE, enlarge
from bench.places import CannotEnlarge, Places
from bench.shapes import SHAPES, Shape

SMALL: dict[str, Any] = {"intermediate_size": 192, "head_dim": 16}
LARGE: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 384, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip
# What changes in SMALL and LARGE: the width's ratio has one digit in base 4, or several; heads are as wide, or wider.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "two copies": ({}, {"hidden_size": 512}),
    "four copies": ({"head_dim": 32}, {"hidden_size": 640, "head_dim": 32}),
    "all copies": ({}, {"hidden_size": 192, "vocab_size": VOCABULARY, "num_hidden_layers": 2}),
    "heads twice as wide": ({}, {"head_dim": 32}),
    "untied": ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    "head of its own": ({}, {"hidden_size": 1024, "tie_word_embeddings": False}),
    "heads that share": ({"num_key_value_heads": 2}, {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 32}),
}


def both(case: str, seed: int, directory: Path) -> tuple[Path, Path]:
    """A random small model and its enlargement."""
    small, large = CASES[case]
    model = make("qwen3", seed, torch.bfloat16, **({"tie_word_embeddings": True} | SMALL | small))
    source = save(model, directory / "small")
    enlarge(source, directory / "large", LARGE | large, seed)
    return source, directory / "large"


def in_double(directory: Path) -> PreTrainedModel:
    """transformers' model in float64, whose norms would round to float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    for path, module in list(model.named_modules()):
        if path.endswith("norm"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    return model


def check(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The logits of the small model's words agree, and a new word is far from winning."""
    torch.testing.assert_close(found[:, :VOCABULARY], wanted, rtol=tolerance, atol=tolerance)
    assert (found[:, :VOCABULARY].argmax(-1) == wanted.argmax(-1)).all()
    assert (found[:, VOCABULARY:] < wanted.amax(-1, keepdim=True) - 100).all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_small_models(case: str, seed: int, tmp_path: Path) -> None:
    small, large = (in_double(directory) for directory in both(case, seed, tmp_path))
    exact = large.config.head_dim // small.config.head_dim in (1, 4)
    for tokens in prompts(random.Random(seed)):
        check(reference(large, tokens), reference(small, tokens), 1e-8 if exact else 1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("case", "group_size"), [("plain", 32), ("plain", 64), ("four copies", 32), ("head of its own", 64)])
def test_four_bits_make_the_same_model_of_both(case: str, group_size: int, seed: int, tmp_path: Path) -> None:
    sequences = prompts(random.Random(seed))
    changes = {"quantization": "int4", "group_size": group_size, "activations": "16bit", "dtype": "float32"}
    small, large = (
        logits_on(1, config_of(directory, **changes), sequences, random.Random(seed))
        for directory in both(case, seed, tmp_path)
    )
    for found, wanted in zip(large, small, strict=True):
        check(found, wanted, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 200}, "no multiple"),
        ({"head_dim": 40}, "no multiple"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"num_key_value_heads": 6}, "too few"),
        ({"hidden_size": 128}, "words"),
        ({"num_hidden_layers": 2}, "one more layer"),
    ],
)
def test_a_shape_without_room_is_refused(change: dict[str, Any], message: str, seed: int, tmp_path: Path) -> None:
    source = save(make("qwen3", seed, torch.bfloat16, tie_word_embeddings=True, **SMALL), tmp_path / "small")
    with pytest.raises(CannotEnlarge, match=message):
        enlarge(source, tmp_path / "large", LARGE | change)


@pytest.mark.parametrize("name", SHAPES)
def test_the_demos_model_fits_real_shapes(name: str) -> None:
    small, large = Shape.of(json.loads((SOURCE / "config.json").read_text())), Shape.of(SHAPES[name])
    places = Places(small, large)
    assert sum(factor**2 for _, factor in places.copies) == large.hidden_size / small.hidden_size
    assert sorted(head for head in places.heads if head is not None) == list(range(small.num_attention_heads))
