"""Without the promise of the same bits: what is faster then, and that its rows are marked as others."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch.nn import functional

from runtime.kernels.loose import MANY, loosened
from runtime.request import Request, SamplingParams
from tests.driver import demo_config, run, start


@pytest.mark.parametrize("rows", [1, MANY - 1, MANY, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_are_a_librarys(rows: int, dtype: torch.dtype, module: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(48, 96).to(dtype)
    loose = loosened(module)
    expected = functional.linear(x, weight) if rows >= MANY else module.dense_linear(x, weight)
    assert torch.equal(loose.dense_linear(x, weight, [32, 64]), expected)
    assert loose.dense_linear(x, weight, (), torch.float32).dtype == torch.float32
    assert not loose.SEGMENTS and loose.gated is module.gated


def test_a_job_runs_and_is_marked() -> None:
    settings = ["model.target=configs/demo/target", "model.quantization=none"]
    prompt = tuple(range(300, 300 + 2 * MANY))
    request = Request(0, prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    outcome = run(demo_config(*settings, "engine.reproducible=false"), [request])
    assert len(outcome.completions[0].tokens) == 8
    marks = {start(demo_config(*settings, f"engine.reproducible={way}"), 1)[0][2].fingerprint for way in ("true", "false")}
    assert len(marks) == 2
