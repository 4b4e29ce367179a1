"""Norms, rotary writes and gated activations: against float64, against each other, and each row by itself."""

import math
import random
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from runtime.kernels.rows import EIGHT_BITS, cache_width, encode

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("one_or_two_threads")


def close(found: Tensor, exact: Tensor, roundings: float) -> None:
    step = torch.finfo(found.dtype).eps
    worst = float(((found.double() - exact).abs() / (exact.abs() + 0.1)).max())
    assert worst <= roundings * step, f"{worst / step:.2f} roundings off"


def some_rows(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(count) for _ in range(rng.randint(1, 2 * count))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(module: ModuleType, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for width in (1, 16, 31, 100, 1024, 2560):
        x, residual = torch.randn(2, 37, width).to(dtype).unbind()
        weight = torch.randn(width)
        eps = rng.choice([1e-6, 1e-5, 0.1])
        for early in (False, True):
            for more in (None, residual):
                normed, total = module.rms_norm(x, weight, eps, early, more)
                sum_ = x if more is None else x + more
                assert torch.equal(total, sum_) and normed.dtype == dtype
                exact = sum_.double() / (sum_.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
                close(normed, exact, 6.0 if dtype == torch.float32 else 1.6)
                rows = some_rows(rng, len(x))
                again = module.rms_norm(x[rows], weight, eps, early, None if more is None else more[rows])
                assert torch.equal(again[0], normed[rows]) and torch.equal(again[1], total[rows])
        nothing, _ = module.rms_norm(x[:0], weight, eps)
        assert nothing.shape == (0, width)


def test_an_early_rounding_is_that_of_llama(module: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(50, 256).bfloat16(), torch.randn(256).bfloat16()
    normed, _ = module.rms_norm(x, weight.float(), 1e-6, True)
    wide = x.float()
    llama = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert (normed != llama).float().mean() < 0.01
    late, _ = module.rms_norm(x, weight.float(), 1e-6, False)
    assert (late != llama).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_writes(module: ModuleType, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(12):
        kv, dim, block, tokens = rng.randint(1, 3), rng.choice([8, 24, 64, 128]), rng.choice([4, 16]), rng.randint(1, 40)
        heads = kv * rng.choice([1, 2, 5])
        turned = rng.choice([dim, dim // 2])
        qkv = torch.randn(tokens, (heads + 2 * kv) * dim).to(dtype)
        angle = torch.rand(tokens, turned) * 100  # two halves that differ: nobody says they don't
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        normed = rng.random() < 0.6
        norms = [torch.randn(dim) if normed else None for _ in range(2)]
        eps, early = 1e-6, rng.random() < 0.5
        slots = torch.tensor(rng.sample(range(block * 20), tokens))
        slots[rng.randrange(tokens)] = -1

        def run(rows: list[int], slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            keys, values = torch.full((2, 20, kv, block, dim), math.nan, dtype=dtype).unbind()  # noqa: B023
            query = module.rotary_write(
                qkv[rows], cos[rows], sin[rows], *norms, eps, early, keys, values, slots  # noqa: B023
            )
            return query, keys, values

        query, keys, values = run(list(range(tokens)), slots)
        q, k, v = qkv.double().view(tokens, -1, dim).split([heads, kv, kv], dim=1)
        if norms[0] is not None and norms[1] is not None:
            q, k = (
                x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()
                for x, w in zip((q, k), norms, strict=True)
            )
        exact = []
        for x in (q, k):
            a, b, rest = x.split([turned // 2, turned // 2, dim - turned], dim=-1)
            whole = torch.cat([a, b], -1) * cos.double()[:, None] + torch.cat([-b, a], -1) * sin.double()[:, None]
            exact.append(torch.cat([whole, rest], -1))
        assert query.dtype == dtype
        # Two roundings of products that may cancel, on top of those of the norm.
        scale = exact[0].abs().max() + exact[1].abs().max()
        step = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1.5)
        assert (query.double() - exact[0]).abs().max() <= step * scale
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert (keys[slot // block, :, slot % block].double() - exact[1][t]).abs().max() <= step * scale
                assert torch.equal(values[slot // block, :, slot % block].double(), v[t])
        assert int((~keys[:, 0, :, 0].isnan()).sum()) == tokens - 1
        one = rng.randrange(tokens)
        alone = run([one], slots[one : one + 1])
        assert torch.equal(alone[0][0], query[one])
        if slots[one] >= 0:
            where = int(slots[one]) // block, slice(None), int(slots[one]) % block
            assert torch.equal(alone[1][where], keys[where])
        rows = rng.sample(range(tokens), tokens)
        shuffled = run(rows, slots[rows])
        assert torch.equal(shuffled[0], query[rows]) and torch.equal(shuffled[1].nan_to_num(7), keys.nan_to_num(7))


@pytest.mark.parametrize("form", EIGHT_BITS)
def test_rotary_writes_round_what_they_write(module: ModuleType, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    qkv, angle = torch.randn(7, 5 * 24).bfloat16(), torch.rand(7, 16) * 100
    cos, sin, slots = angle.cos().bfloat16(), angle.sin().bfloat16(), torch.tensor([3, 0, -1, 7, 11, 5, 4])
    wide = torch.zeros(2, 3, 2, 4, 24).bfloat16()
    narrow = torch.zeros(2, 3, 2, 4, cache_width(24, EIGHT_BITS[form]), dtype=torch.uint8).view(EIGHT_BITS[form])
    queries = [
        module.rotary_write(qkv, cos, sin, torch.ones(24), torch.ones(24), 1e-6, True, *caches, slots)
        for caches in (wide, narrow)
    ]
    assert torch.equal(*queries)
    assert torch.equal(narrow.view(torch.uint8), encode(wide.float(), EIGHT_BITS[form]).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates(module: ModuleType, activation: str, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for width in (1, 16, 37, 3072):
        both = (torch.randn(33, 2 * width) * rng.choice([0.1, 1.0, 20.0])).to(dtype)
        gate, up = both.double().split(width, dim=1)
        exact = (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up
        found = module.gated(both, activation)
        assert found.dtype == dtype
        close(found, exact, 12.0 if dtype == torch.float32 else 1.6)
        rows = some_rows(rng, len(both))
        assert torch.equal(module.gated(both[rows], activation), found[rows])
    assert module.gated(both[:0], activation).shape == (0, 3072)
    both = torch.tensor([[math.inf, 0.0, math.nan, 2.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    found = module.gated(both, activation)[0]
    assert found[0] == math.inf and found[1] == 0 and found[2].isnan() and found[3].isfinite()


def test_wrong_arguments_are_named(module: ModuleType) -> None:
    x, weight, cache = torch.randn(2, 64), torch.randn(64), torch.zeros(1, 1, 4, 16)
    angle, slots = torch.zeros(2, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="float32"):
        module.rms_norm(x, weight.half(), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        module.rms_norm(x, weight, 1e-6, False, x[:1])
    with pytest.raises(ValueError, match="activations are"):
        module.gated(x, "relu")
    module.rotary_write(x, angle, angle, None, None, 0.0, False, cache, cache.clone(), slots)
    with pytest.raises(ValueError, match="no heads"):
        module.rotary_write(x[:, :40], angle, angle, None, None, 0.0, False, cache, cache, slots)
    with pytest.raises(ValueError, match="turn"):
        module.rotary_write(x, angle[:, :3], angle[:, :3], None, None, 0.0, False, cache, cache, slots)
    with pytest.raises(IndexError, match="slot 4"):
        module.rotary_write(x, angle, angle, None, None, 0.0, False, cache, cache.clone(), slots + 3)
