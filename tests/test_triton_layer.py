"""The GPU's small operations of a layer against the reference's, and a row has the same bits by itself."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.rows import EIGHT_BITS, cache_width, decode
from tests.on_triton import DTYPES, MODULE, quiet

pytestmark = quiet


def near(found: Tensor, wanted: Tensor) -> None:
    """Within a rounding of each other, the odd one of two."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    step = torch.finfo(wanted.dtype).eps * (8 if wanted.dtype == torch.float32 else 1)
    error = (found.double() - wanted.double()).abs() / (wanted.double().abs() + 0.1)
    assert float(error.max()) <= 2 * step and float(error.square().mean()) <= step**2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    for width, early in ((1, False), (31, True), (2560, True), (1024, False)):
        x, residual = torch.randn(2, 5, width + 3).to(dtype)[..., :width]
        for more in (None, residual):
            found, wanted = (m.rms_norm(x, torch.linspace(-1, 2, width), 1e-5, early, more) for m in (MODULE, reference))
            near(found[0], wanted[0])
            assert torch.equal(found[1], wanted[1])
            alone = MODULE.rms_norm(x[3:4], torch.linspace(-1, 2, width), 1e-5, early, None if more is None else more[3:4])
            assert torch.equal(alone[0][0], found[0][3])
    assert MODULE.rms_norm(x[:0], torch.ones(1024), 1e-5)[0].shape == (0, 1024)


@pytest.mark.parametrize("form", ["same", *EIGHT_BITS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_writes(dtype: torch.dtype, form: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv, dim, block, tokens = rng.randint(1, 3), rng.choice([8, 24, 64]), rng.choice([4, 16]), 5
    heads, turned = kv * rng.choice([1, 2, 5]), rng.choice([dim, dim // 2])
    qkv, angle = torch.randn(tokens, (heads + 2 * kv) * dim).to(dtype), torch.rand(tokens, turned) * 100
    norms = [torch.randn(dim) if rng.random() < 0.6 else None for _ in range(2)]
    slots = torch.tensor(rng.sample(range(block * 3), tokens))
    slots[rng.randrange(tokens)] = -1
    held = EIGHT_BITS.get(form, dtype)

    def run(module: object, rows: slice) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(2, 3, kv, block, cache_width(dim, held) * held.itemsize, dtype=torch.uint8).view(held)
        query = module.rotary_write(  # type: ignore[attr-defined]
            qkv[rows], angle.cos().to(dtype)[rows], angle.sin().to(dtype)[rows], *norms, 1e-6, True, *cache, slots[rows]
        )
        return query, cache

    (query, cache), (wanted, theirs) = (run(module, slice(None)) for module in (MODULE, reference))
    near(query, wanted)
    if norms[1] is None:
        assert torch.equal(cache.view(torch.uint8), theirs.view(torch.uint8))
    elif form == "same":
        near(cache, theirs)
    else:
        assert (decode(cache) - decode(theirs)).abs().max() <= decode(theirs).abs().max() / 14
    alone = run(MODULE, slice(2, 3))
    assert torch.equal(alone[0][0], query[2])
    if slots[2] >= 0:
        place = slice(None), int(slots[2]) // block, slice(None), int(slots[2]) % block
        assert torch.equal(alone[1].view(torch.uint8)[place], cache.view(torch.uint8)[place])
    assert run(MODULE, slice(0, 0))[0].shape == (0, heads, dim)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates(dtype: torch.dtype, activation: str, seed: int) -> None:
    torch.manual_seed(seed)
    for width in (1, 37, 1100):
        both = (torch.randn(4, 2 * width + 5) * 3).to(dtype)[:, : 2 * width]
        found = MODULE.gated(both, activation)
        near(found, reference.gated(both, activation))
        assert torch.equal(MODULE.gated(both[2:3], activation)[0], found[2])
    both = torch.tensor([[torch.inf, 0.0, torch.nan, -200.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    assert torch.equal(MODULE.gated(both, activation).nan_to_num(7), reference.gated(both, activation).nan_to_num(7))
    assert MODULE.gated(both[:0], activation).shape == (0, 4)
