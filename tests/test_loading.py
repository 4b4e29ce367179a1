"""What is said while a model is loaded."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from configs.schema import ModelConfig
from runtime.comm import Solo
from runtime.model import load_model
from tests.tiny_models import make, save
from workers.loading import Loading


@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_each_part_is_counted_once(quantization: str, seed: int, tmp_path: Path) -> None:
    config = ModelConfig(target=str(save(make("qwen3", seed), tmp_path)), quantization=quantization, group_size=32)
    told: list[tuple[int, int]] = []
    load_model(config, Solo(), on_part=lambda done, total: told.append((done, total)))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)] and told


@pytest.mark.parametrize("aloud", [True, False])
def test_a_line_now_and_then(aloud: bool) -> None:
    times, file = iter([100.0, 101.0, 105.5, 107.0, 111.0]), io.StringIO()
    loading = Loading("models/m", aloud, file, lambda: next(times))
    for done in range(1, 5):
        loading(done, 4)
    lines = ["models/m: 50% of the weights are loaded", "models/m: 100% of the weights are loaded"]
    assert file.getvalue().splitlines() == lines * aloud
