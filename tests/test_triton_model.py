"""A whole model on the GPU's kernels: the reference's logits, and a sequence has the same bits in any batches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import config_of, logits_on, make, save

import runtime.model
from runtime.kernels import reference
from tests.on_triton import HAS_GPU, gpu, quiet

pytestmark = [quiet, pytest.mark.skipif(HAS_GPU, reason="the model is loaded onto the CPU")]


def test_a_model_runs_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    save(make("qwen3", seed), tmp_path)
    config = config_of(tmp_path, quantization="int4", group_size=32, activations="16bit", symmetric=False)
    sequences = [[rng.randrange(90) for _ in range(length)] for length in (7, 3)]
    monkeypatch.setattr(runtime.model, "select", lambda device: gpu)
    first, again = (logits_on(1, config, sequences, rng, largest) for largest in (3, 9))
    monkeypatch.setattr(runtime.model, "select", lambda device: reference)
    expected = logits_on(1, config, sequences, rng)
    for one, two, right in zip(first, again, expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)
