"""Screening of logits: what floors promise, who is refined and how well, and each row by itself."""

import math
import random
from types import ModuleType

import pytest
import torch

from runtime.kernels.reference_screen import SIGMAS
from runtime.quantize.int4 import quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("one_or_two_threads")
def test_who_may_win_is_exact(module: ModuleType, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for rows, inputs, tokens in ((1, 32, 1), (7, 96, 37), (3, 160, 5000), (20, 100, 2100)):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(tokens, inputs).to(dtype)
        logits, errors = (3 * torch.randn(rows, tokens)).to(dtype), torch.rand(tokens) * 0.05
        reach, floor = module.floors(logits, x, errors)
        wanted = SIGMAS * x.double().square().sum(1).sqrt()
        torch.testing.assert_close(reach.double(), wanted, rtol=1e-5, atol=0)
        low, high = (logits.double() + sign * reach.double()[:, None] * errors.double() for sign in (-1, 1))
        torch.testing.assert_close(floor.double(), low.amax(1), rtol=1e-5, atol=1e-5)
        near, clear = ((high - floor.double()[:, None]) * sign > 1e-4 for sign in (1, -1))
        assert bool(near.any(1).all())
        exact = x.double() @ weight.double().T
        refined = logits.clone()
        module.refine(refined, x, weight, errors, reach, floor)
        step = torch.finfo(dtype).eps * exact.abs() + 4 * math.sqrt(inputs) * torch.finfo(torch.float32).eps
        assert bool(((refined.double() - exact).abs() <= step)[near].all())
        assert torch.equal(refined[clear], logits[clear])
        some = [rng.randrange(rows) for _ in range(rng.randint(1, 2 * rows))]
        again = logits[some]
        reach_again, floor_again = module.floors(again, x[some], errors)
        assert torch.equal(reach_again, reach[some]) and torch.equal(floor_again, floor[some])
        module.refine(again, x[some], weight, errors, reach_again, floor_again)
        assert torch.equal(again, refined[some])


def test_four_bits_err_within_the_reach(module: ModuleType, seed: int) -> None:
    """Errors over their standard errors: a mean square of one, and of ten million none beyond SIGMAS.

    Normal errors would be in one run of 10^8; sums of 512 rounding errors have thinner tails.
    """
    torch.manual_seed(seed)
    weight, x = torch.randn(8192, 512) * torch.rand(8192, 1), torch.randn(1280, 512) * torch.rand(512)
    held = quantize(weight, 128, True).dequantize()
    errors = (held - weight).square().mean(1).sqrt()
    reach, _ = module.floors(x @ held.T, x, errors)
    off = (x @ (held - weight).T) / (reach[:, None] / SIGMAS * errors)
    assert 0.98 < off.square().mean() < 1.02 and off.abs().max() < SIGMAS


def test_wrong_arguments_are_named(module: ModuleType) -> None:
    logits, x, weight, errors = torch.zeros(2, 8), torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(8)
    with pytest.raises(ValueError, match=r"aren't of x"):
        module.floors(logits, x[:1], errors)
    with pytest.raises(ValueError, match=r"alike"):
        module.floors(logits.bfloat16(), x, errors)
    with pytest.raises(ValueError, match=r"errors must be"):
        module.floors(logits, x, errors[:4])
    reach, floor = module.floors(logits, x, errors)
    with pytest.raises(ValueError, match=r"weight doesn't fit"):
        module.refine(logits, x, weight[:, :2], errors, reach, floor)
