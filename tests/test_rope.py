"""Rotary scaling: positions known, and angles that depend on a position alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, config_of, logits_on, make, on_ranks, reference, save
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime.checkpoint import ModelError
from runtime.comm import Solo
from runtime.model import load_model
from runtime.rope import Angles, longest, settle

pytestmark = pytest.mark.usefixtures("one_thread")

THETA = 1e4
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)]}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": LONG | {"original_max_position_embeddings": 32, "factor": 4.0},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"factor": 4.0, "partial_rotary_factor": 0.5},
}


def test_no_kind_of_scaling_is_left_out() -> None:
    assert set(ROPE_INIT_FUNCTIONS) - {"default"} <= set(KINDS)


def scaled(kind: str, known: int) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": THETA} | KINDS[kind]
    return {"rope_parameters": rope, "max_position_embeddings": known}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_as_long_as_the_run_allows_is_that_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    """Below the length of training, and far above it."""
    rng = random.Random(seed)
    model = make("llama", seed, **scaled(kind, 32 if kind not in ("longrope", "llama3") else 128))
    save(model, tmp_path)
    for length in (30, 128):
        tokens = [rng.randrange(VOCABULARY) for _ in range(length)]
        (found,) = logits_on(rng.choice([1, 2]), config_of(tmp_path), [tokens], rng, rng.choice([5, 40]), length=length)
        torch.testing.assert_close(found, reference(model, tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_do_not_depend_on_the_company(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    save(make("llama", seed, **scaled(kind, 128)), tmp_path)
    short, long = ([rng.randrange(VOCABULARY) for _ in range(n)] for n in (20, 120))
    alone = logits_on(1, config_of(tmp_path), [short], rng, length=128)
    beside = logits_on(1, config_of(tmp_path), [short, long], rng, length=128)
    assert torch.equal(alone[0], beside[0])


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "proportional", "factor": 4.0, "partial_rotary_factor": 0.5}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16} | LONG, 64),
    ],
)
def test_positions_that_a_config_knows(rope: dict[str, Any], known: int, seed: int, tmp_path: Path) -> None:
    changes = {"rope_parameters": {"rope_theta": THETA} | rope, "max_position_embeddings": 64}
    assert longest(LlamaConfig(**changes)) == known
    save(make("llama", seed, **changes), tmp_path)
    assert load_model(config_of(tmp_path), Solo()).max_model_len == known
    assert load_model(config_of(tmp_path), Solo(), length=known).max_model_len == known
    with pytest.raises(ModelError, match=rf"engine.max_model_len is {known + 1}, and .* knows {known} positions"):
        on_ranks(1, lambda comm: load_model(config_of(tmp_path), comm, length=known + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_looked_up_angles_are_the_embeddings_own(kind: str, seed: int) -> None:
    """However far the table had grown before; one of another model, or of half the position, would be seen."""
    rng = random.Random(seed)
    model = make("llama", seed, **scaled(kind, 8192))
    settle(model, 8192)  # as a loaded model is
    rotary = model.model.rotary_emb
    for dtype in (torch.float32, torch.bfloat16):
        x, at_once, growing = torch.zeros(1, 1, dtype=dtype), Angles(rotary), Angles(rotary)
        for limit in (10, 1023, 1025, 5000):
            positions = torch.tensor([limit - 1, *(rng.randrange(limit) for _ in range(20))])
            found = growing(x, positions, limit)
            assert all(map(torch.equal, found, at_once(x, positions, 6000)))
            for mine, theirs in zip(found, rotary(x[None], positions[None]), strict=True):
                assert mine.dtype == dtype
                torch.testing.assert_close(mine, theirs[0], rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-2)
