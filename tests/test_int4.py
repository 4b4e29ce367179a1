"""Four- and eight-bit weights and their products: exact integers, the float32 that follows, and slices that commute."""

import dataclasses
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime import kernels
from runtime.kernels import reference
from runtime.kernels.packed import PackedInt4, PackedInt8
from runtime.pages import Pages
from runtime.quantize import int4, int8
from runtime.quantize.int4 import Int4Weight
from runtime.quantize.int8 import Int8Weight
from tests.branches import branches

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(rng: random.Random) -> Int4Weight:
    """Codes, scales and zeros that no quantiser made: every combination must come out right."""
    size = rng.choice([32, 64, 128, 128, 8, 24])
    outputs, groups = rng.choice([1, 5, 16, 48, 50]), rng.randrange(1, 6)
    scale = torch.rand(outputs, groups) * 10 ** rng.uniform(-4, 1)
    if rng.random() < 0.5:
        scale = scale.bfloat16().float()
    zero = torch.randint(0, 16, scale.shape) if rng.random() < 0.6 else torch.full(scale.shape, 8)
    codes = torch.randint(0, 16, (outputs, groups * size))
    return Int4Weight(codes.to(torch.uint8), scale, zero.to(torch.uint8), size)


def random_rows(rng: random.Random, inputs: int) -> Tensor:
    x = torch.randn(rng.choice([1, 2, 3, 4, 7, 8, 9, 16, 31, 65, 130]), inputs) * 10 ** rng.uniform(-3, 2)
    x[:, rng.randrange(inputs)] *= 30.0  # an outlier
    if rng.random() < 0.3:
        x[rng.randrange(len(x))] = 0.0
    return x.to(rng.choice(DTYPES))


def rounded(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes int64 [M, G, size] and scales float32 [M, G], the specification once more."""
    group = x.float().view(len(x), -1, size)
    amax = group.abs().amax(-1)
    steps = torch.full_like(amax, 127.0)
    inverse = torch.where(amax >= 2.0**-100, steps / amax, 0.0)
    return torch.round(group * inverse[..., None]).long(), torch.where(amax >= 2.0**-100, amax / steps, 0.0)


def specified_int4(x: Tensor, weight: Int4Weight) -> Tensor:
    code, x_scale = rounded(x, weight.group_size)
    w = weight.codes.long().view(*weight.scale.shape, weight.group_size) - weight.zero.long()[..., None]
    out = torch.zeros(len(x), len(w))
    for g in range(w.shape[1]):
        exact = (code[:, g, None, :] * w[None, :, g]).sum(-1)
        out = out + exact.float() * (x_scale[:, g, None] * weight.scale[:, g])
    return out.to(x.dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_module_rounds_to_the_same_bits(module: ModuleType, symmetric: bool, seed: int) -> None:
    """Any dtype, any group, slices of a wider weight, groups of nothing; what isn't finite is refused."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(20):
        size, outputs = rng.choice([8, 24, 32, 40, 64, 128, 136]), rng.randint(1, 40)
        inputs = size * rng.randint(1, 5)
        wide = torch.randn(outputs, inputs + 2 * size) * 10 ** torch.empty(outputs, 1).uniform_(-6, 4)
        weight = wide.to(rng.choice([*DTYPES, torch.float64]))[:, size : size + inputs]
        weight[rng.randrange(outputs), :size] = rng.choice([0.0, 1e-38, -1.0])
        found, wanted = module.quantize_int4(weight, size, symmetric), int4.quantize(weight, size, symmetric)
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), (name, weight.dtype, size)
        weight[rng.randrange(outputs), rng.randrange(inputs)] = rng.choice([float("nan"), float("inf"), -float("inf")])
        with pytest.raises(ValueError, match="finite"):
            module.quantize_int4(weight, size, symmetric)
    with pytest.raises(ValueError, match="groups of 48"):
        module.quantize_int4(torch.zeros(4, 64), 48, symmetric)


def test_int4_with_int8_activations_is_its_specification(module: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        weight = random_weight(rng)
        x = random_rows(rng, weight.codes.shape[1])
        result = module.int4_linear(x, module.pack_int4(weight, "int8"))
        assert result.dtype == x.dtype and torch.equal(result, specified_int4(x, weight))


def test_int4_with_16bit_activations_is_near_the_exact_product(module: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        weight = random_weight(rng)
        x = random_rows(rng, weight.codes.shape[1])
        result = module.int4_linear(x, module.pack_int4(weight, "16bit"))
        # float64 all along: the scales aren't rounded when they are multiplied
        groups = weight.codes.view(*weight.scale.shape, -1).double() - weight.zero[..., None].double()
        full = (groups * weight.scale[..., None].double()).view(weight.codes.shape)
        room = x.double().abs() @ full.abs().t() * 2e-6 + torch.finfo(x.dtype).tiny
        exact = x.double() @ full.t()
        assert result.dtype == x.dtype
        finite = exact.abs() < torch.finfo(x.dtype).max
        assert bool(((result.double() - exact).abs() <= room + torch.finfo(x.dtype).eps * exact.abs())[finite].all())


def test_int8_is_its_specification(module: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        outputs, inputs = rng.choice([1, 16, 33]), rng.choice([1, 3, 64, 130, 1000])
        weight = Int8Weight(torch.randint(-127, 128, (outputs, inputs)).to(torch.int8), torch.rand(outputs))
        x = random_rows(rng, inputs)
        code, x_scale = rounded(x, inputs)
        expected = (code[:, 0] @ weight.codes.long().t()).float() * (x_scale * weight.scale)
        assert torch.equal(module.int8_linear(x, module.pack_int8(weight)), expected.to(x.dtype))


def test_the_largest_sums_are_exact(module: ModuleType) -> None:
    inputs = 65536 if module is not reference else 4096
    x = torch.ones(2, inputs)
    x[1] = -1.0
    weight = Int8Weight(torch.full((1, inputs), -127, dtype=torch.int8), torch.ones(1))
    expected = torch.tensor(-127 * 127 * inputs).float() * torch.tensor(1.0 / 127.0)
    assert module.int8_linear(x, module.pack_int8(weight)).flatten().tolist() == [expected, -expected]


@pytest.mark.parametrize("activations", ["int8", "16bit", "head"])
def test_a_row_is_alone(module: ModuleType, activations: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            w = torch.randn(200, 512)
            x = torch.randn(150, 512).to(dtype)
            if activations == "head":
                eight = module.pack_int8(int8.quantize(w))

                def run(x: Tensor, packed: object = eight) -> Tensor:
                    return module.int8_linear(x, packed)
            else:
                four = module.pack_int4(int4.quantize(w, 64, symmetric=rng.random() < 0.5), activations)

                def run(x: Tensor, packed: object = four) -> Tensor:
                    return module.int4_linear(x, packed)

            torch.set_num_threads(2)
            whole = run(x)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for count in (1, 2, 5, 8, 17, 64, 65, 149):
                    which = torch.tensor([rng.randrange(150) for _ in range(count)])
                    assert torch.equal(run(x[which]), whole[which])
            x[3, 7] = rng.choice([float("nan"), float("inf")])
            spoilt = run(x)
            assert spoilt[3].isnan().all() or activations == "16bit"
            rest = torch.arange(150) != 3
            assert torch.equal(spoilt[rest], whole[rest])
    finally:
        torch.set_num_threads(before)


def test_threads_of_several_callers(module: ModuleType, seed: int) -> None:
    """More of them than cores, so that some come late to every loop."""
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    packed = module.pack_int4(int4.quantize(torch.randn(600, 128), 64, symmetric=True), "int8")
    inputs = [torch.randn(70, 128) for _ in range(3)]
    try:
        torch.set_num_threads(1)
        expected = [module.int4_linear(x, packed) for x in inputs]
        torch.set_num_threads(7)
        with ThreadPoolExecutor(len(inputs)) as pool:
            for _ in range(50):
                found = list(pool.map(lambda x: module.int4_linear(x, packed), inputs))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_empty_products(module: ModuleType) -> None:
    packed = module.pack_int4(int4.quantize(torch.randn(20, 64), 32, symmetric=True), "int8")
    assert module.int4_linear(torch.zeros(0, 64), packed).shape == (0, 20)
    nothing = int4.quantize(torch.randn(20, 64), 32, symmetric=True).groups(slice(0, 0))  # a rank without a group
    for activations in ("int8", "16bit"):
        product = module.int4_linear(torch.zeros(3, 0), module.pack_int4(nothing, activations))
        assert torch.equal(product, torch.zeros(3, 20))
    assert module.int8_linear(torch.zeros(0, 4), module.pack_int8(int8.quantize(torch.ones(3, 4)))).shape == (0, 3)


def test_wrong_arguments_are_named(module: ModuleType) -> None:
    weight = int4.quantize(torch.randn(16, 64), 32, symmetric=True)
    with pytest.raises(ValueError, match="int8, 16bit"):
        module.pack_int4(weight, "int7")
    packed = module.pack_int4(weight, "int8")
    with pytest.raises(ValueError, match="64"):
        module.int4_linear(torch.zeros(2, 63), packed)
    with pytest.raises(ValueError, match="int64"):
        module.int4_linear(torch.zeros(2, 64, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match="groups of 48"):
        int4.quantize(torch.randn(16, 64), 48, symmetric=True)
    with pytest.raises(ValueError, match="finite"):
        int4.quantize(torch.full((1, 32), float("nan")), 32, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_shards_of_a_quantised_weight_are_quantised_shards(symmetric: bool, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for size in (32, 64, 128):
        w = torch.randn(rng.randrange(1, 90), size * 7) * torch.rand(1, size * 7)
        whole = int4.quantize(w, size, symmetric)
        a, b = sorted(rng.randrange(len(w) + 1) for _ in range(2))
        rows = int4.quantize(w[a:b], size, symmetric)
        c, d = sorted(rng.randrange(8) for _ in range(2))
        groups = int4.quantize(w[:, c * size : d * size], size, symmetric)
        for cut, made in ((whole.rows(slice(a, b)), rows), (whole.groups(slice(c, d)), groups)):
            assert torch.equal(cut.codes, made.codes)
            assert torch.equal(cut.scale, made.scale) and torch.equal(cut.zero, made.zero)
    w = torch.randn(9, 40)
    assert torch.equal(int8.quantize(w).rows(slice(2, 5)).codes, int8.quantize(w[2:5]).codes)


def test_shards_make_the_whole_product(module: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = int4.quantize(torch.randn(70, 512), 64, symmetric=False), torch.randn(5, 512)
    whole = module.int4_linear(x, module.pack_int4(weight, "int8"))
    parts = [module.int4_linear(x, module.pack_int4(weight.rows(s), "int8")) for s in (slice(0, 33), slice(33, 70))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    parts = [
        module.int4_linear(x[:, a * 64 : b * 64], module.pack_int4(weight.groups(slice(a, b)), "int8"))
        for a, b in ((0, 3), (3, 8))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_packed_pieces_are_joined(module: ModuleType, seed: int) -> None:
    """Also where only some have zero points, or scales that need 32 bits."""
    torch.manual_seed(seed)
    pieces = [int4.quantize(torch.randn(rows, 128), 32, symmetric) for rows, symmetric in ((64, True), (32, False), (5, True))]
    pieces[2] = dataclasses.replace(pieces[2], scale=pieces[2].scale * 1.001)
    whole = module.pack_int4(int4.merge(pieces), "int8")
    joined = PackedInt4.join([module.pack_int4(piece, "int8") for piece in pieces], 101, Pages())
    assert (joined.out_features, joined.nbytes) == (101, whole.nbytes)
    x, w = torch.randn(5, 128), torch.randn(53, 40)
    assert torch.equal(module.int4_linear(x, joined), module.int4_linear(x, whole))
    eights = [int8.quantize(rows) for rows in w.split([32, 21])]
    both = PackedInt8.join([module.pack_int8(eight) for eight in eights], Pages())
    assert torch.equal(module.int8_linear(x[:, :40], both), module.int8_linear(x[:, :40], module.pack_int8(int8.quantize(w))))


@pytest.mark.parametrize("activations", ["int8", "16bit"])
def test_segments_are_products_of_their_own(activations: str, module: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for count in range(1, 9):
        size = rng.choice([32, 64])
        edges = [0, *sorted(rng.sample(range(1, 12), count - 1)), 12]
        weight = int4.quantize(torch.randn(rng.randint(1, 70), 12 * size), size, symmetric=rng.random() < 0.5)
        x = torch.randn(rng.choice([1, 5, 16, 70]), 12 * size).to(rng.choice([torch.bfloat16, torch.float32]))
        packed, borders = module.pack_int4(weight, activations), [edge * size for edge in edges[1:-1]]
        cuts = [module.pack_int4(weight.groups(slice(a, b)), activations) for a, b in pairwise(edges)]
        inputs = x.split([cut.in_features for cut in cuts], dim=1)
        parts = [module.int4_linear(*part, dtype=torch.float32) for part in zip(inputs, cuts, strict=True)]
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(module.int4_linear(x, packed, None, borders, dtype), branches(parts).to(dtype))
        assert torch.equal(module.int4_linear(x, packed, None, borders), branches(parts).to(x.dtype))
    for wrong in ([size - 1], [size, size], [12 * size], [0]):
        with pytest.raises(ValueError, match="segments"):
            module.int4_linear(x, packed, None, wrong)


def test_rounding_is_to_the_nearest(seed: int) -> None:
    torch.manual_seed(seed)
    w = torch.randn(64, 256)
    zeros = int4.quantize(w, 64, symmetric=False)
    error = (zeros.dequantize() - w).abs().view(64, 4, 64)
    # Within half a step, but for what the rounding of the zero point and of the scale clamps away at the ends.
    assert bool((error <= zeros.scale[..., None] * 1.1).all()) and error.mean() < zeros.scale.mean() * 0.26
    same = int4.quantize(w, 64, symmetric=True)
    assert bool((same.zero == 8).all()) and torch.equal(same.scale, same.scale.bfloat16().float())
    sevenths = (w.view(64, 4, 64).abs().amax(-1) / 7).bfloat16().float()
    plain = torch.round(w.view(64, 4, 64) / sevenths[..., None]).clamp(-8, 7) * sevenths[..., None]
    best = ((same.dequantize() - w) ** 2).view(64, 4, 64).sum(-1)
    assert bool((best <= ((plain - w.view(64, 4, 64)) ** 2).sum(-1) * (1 + 1e-5)).all())
    flat = int4.quantize(torch.zeros(2, 32), 32, symmetric=False)
    assert torch.equal(flat.dequantize(), torch.zeros(2, 32))
    exact = torch.randint(-8, 8, (4, 64)).float()
    exact[:, 0] = -8.0
    assert torch.equal(int4.quantize(exact, 64, symmetric=True).dequantize(), exact)
    for sign in (1.0, -1.0):  # a group on one side of zero keeps zero
        zero = int4.quantize(sign * torch.rand(3, 32), 32, symmetric=False).zero
        assert bool((zero == (0 if sign > 0 else 15)).all())


@pytest.mark.parametrize("march", os.environ.get("QUASAR_TEST_MARCH", "haswell").split(","))
def test_other_instruction_sets_give_the_same_bits(march: str) -> None:
    """AVX2 without VNNI: built for it, the same tests in another process. `QUASAR_TEST_MARCH=x86-64` for plain C++."""
    if os.uname().machine != "x86_64" or os.environ.get("QUASAR_MARCH"):
        pytest.skip("for x86, and once")
    if kernels.select(torch.device("cpu")) is reference:
        pytest.skip("the C++ kernels can't be built here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_int4.py", "-k", "cpu and not sets"],
        cwd=ROOT, env={**os.environ, "QUASAR_MARCH": march}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
