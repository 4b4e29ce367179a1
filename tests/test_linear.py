"""Linear layers: rows that don't depend on each other, siblings in one product, splits that add up."""

import gc
import random
import weakref
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from tiny_models import on_ranks
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from runtime.comm import Communicator, Solo
from runtime.kernels import reference, select
from runtime.kernels.reference import CHUNK
from runtime.layout import Rows
from runtime.linear import ColumnParallel, Dense, Int4, RowParallel, Siblings, VocabEmbedding
from runtime.pointwise import Pointwise, steady
from runtime.quantize.int4 import quantize
from runtime.shard import segments, spans
from tests.branches import branches


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_dense_rows_do_not_depend_on_each_other(dtype: torch.dtype, threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shapes = [(32, 1000), (64, 16), (96, 24), (256, 100), (512, 512), (1024, 96)]
    for inputs, outputs in shapes if threads == 1 else rng.sample(shapes, 2):
        product = Dense((torch.randn(outputs, inputs) / inputs**0.5).to(dtype))
        x = torch.randn(600, inputs).to(dtype)
        whole = product(x)
        torch.testing.assert_close(whole, functional.linear(x, product.weight))
        for count in [1, 2, CHUNK["cpu"] - 1, CHUNK["cpu"], CHUNK["cpu"] + 1, *(rng.randint(1, 600) for _ in range(3))]:
            start = rng.randint(0, 600 - count)
            assert torch.equal(product(x[start : start + count]), whole[start : start + count])
            chosen = torch.randint(0, 600, (count,))
            assert torch.equal(product(x[chosen]), whole[chosen])
        wide = torch.randn(40, inputs + 7).to(dtype)
        wide[:, 3:-4] = x[:40]
        assert torch.equal(product(wide[:, 3:-4]), whole[:40])
        assert product(x[:0]).shape == (0, outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "sigmoid"])
def test_activations_do_not_depend_on_place(name: str, dtype: torch.dtype, threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    inner = ACT2FN[name]
    function = Pointwise(inner)
    for width in (5, 96, 160, 1000) if threads == 1 else (160,):
        both = torch.randn(300, 2 * width).to(dtype) * 3
        x = both[:, :width]
        whole = function(x)
        torch.testing.assert_close(whole, inner(x))
        for count in (1, 2, 3, 7, 33, 200):
            start = int(torch.randint(0, 300 - count, ()))
            assert torch.equal(function(x[start : start + count]), whole[start : start + count])


def test_steady_finds_activations_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Sequential(ACT2FN["gelu_pytorch_tanh"], nn.LayerNorm(4)))
    x = torch.randn(2, 4)
    before = model(x)
    steady(model)
    assert isinstance(model[1], Pointwise) and isinstance(model[2][0], Pointwise)
    assert isinstance(model[0], nn.Linear) and isinstance(model[2][1], nn.LayerNorm)
    torch.testing.assert_close(model(x), before)


class Counting(Dense):
    calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(x)


def test_siblings_are_one_product() -> None:
    weights = [torch.randn(n, 64) for n in (48, 16, 16)]
    product, bias = Counting(torch.cat(weights)), torch.randn(80)
    siblings = Siblings(product, [48, 16, 16], bias)
    q, k, v = (ColumnParallel(siblings, index) for index in range(3))

    def right(out: torch.Tensor, x: torch.Tensor, index: int) -> None:
        part = bias.split([48, 16, 16])[index]
        torch.testing.assert_close(out, functional.linear(x, weights[index], part), rtol=1e-4, atol=1e-4)

    x, y = torch.randn(1, 5, 64), torch.randn(1, 7, 64)
    for order in ((0, 1, 2), (2, 0, 1)):
        product.calls = 0
        for index in order:
            right((q, k, v)[index](x), x, index)
        assert product.calls == 1
    # Other inputs in between, and the same sibling twice: slower, never wrong.
    for module, index, given in [(q, 0, x), (k, 1, y), (v, 2, x), (v, 2, x), (q, 0, y), (k, 1, y)]:
        right(module(given), given, index)
    # An equal tensor at the same address is not the same tensor.
    z = torch.randn(1, 3, 64)
    first = q(z)
    z = torch.randn(1, 3, 64)
    right(k(z), z, 1)
    assert first.shape == (1, 3, 48)


def test_siblings_keep_nothing_once_all_were_served() -> None:
    siblings = Siblings(Dense(torch.randn(32, 64)), [16, 16])
    x = torch.randn(2, 64)
    gone = weakref.ref(x)
    outputs = [siblings(x, 0), siblings(x, 1)]
    kept = weakref.ref(outputs[0])
    del x, outputs
    gc.collect()
    assert gone() is None and kept() is None
    with pytest.raises(ValueError, match="add up"):
        Siblings(Dense(torch.randn(32, 64)), [16, 15])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_columns_then_rows_are_the_whole(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    up, down = nn.Linear(64, 112), nn.Linear(112, 64)
    x = torch.randn(1, 9, 64)
    inner = spans(112, 16, size)

    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = inner[comm.rank]
        rows = slice(*mine)
        siblings = Siblings(Dense(up.weight.detach()[rows]), [mine.width], up.bias.detach()[rows])
        split = RowParallel(Dense(down.weight.detach()[:, rows]), down.bias.detach(), comm)
        taking = RowParallel(Dense(down.weight.detach()[:, rows]), down.bias.detach(), comm, taken=mine)
        gathered = ColumnParallel(siblings, 0, comm, inner)(x)
        return split(ColumnParallel(siblings)(x)), taking(gathered), gathered

    with torch.inference_mode():
        for found, again, middle in on_ranks(size, work):
            torch.testing.assert_close(middle, up(x))
            torch.testing.assert_close(found, down(up(x)))
            assert torch.equal(found, again)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_of_a_split_vocabulary(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    whole = nn.Embedding(100, 32, padding_idx=99)
    ids = torch.randint(0, 100, (1, 50))

    def work(comm: Communicator) -> torch.Tensor:
        span = spans(100, 16, size)[comm.rank]
        inner = nn.Embedding(100, 32, padding_idx=99)
        inner.weight = nn.Parameter(whole.weight.detach()[slice(*span)])
        embedding = VocabEmbedding(inner, span, comm)
        assert embedding.weight is inner.weight
        return embedding(ids)

    with torch.inference_mode():
        for found in on_ranks(size, work):
            assert torch.equal(found, whole(ids))


def test_a_row_parallel_layer_alone_asks_nobody() -> None:
    layer = RowParallel(Dense(torch.eye(32)), None, Solo())
    x = torch.randn(2, 3, 32)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("module", [reference, select(torch.device("cpu"))], ids=lambda module: module.__name__)
def test_dense_products_are_right(module: ModuleType, dtype: torch.dtype, threads: int, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(20):
        rows, inputs, outputs = rng.randint(0, 100), rng.choice([32, 96, 100, 512, 1024]), rng.randint(1, 200)
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        product = Dense(weight, module)
        found, exact = product(x), x.double() @ weight.double().t()
        assert found.dtype == dtype and found.shape == exact.shape
        step = torch.finfo(dtype).eps * (0.51 if dtype != torch.float32 else 8.0)
        walk = (x.double().square() @ weight.double().square().t()).sqrt()  # how far a sum of these wanders from zero
        assert ((found.double() - exact).abs() <= step * exact.abs() + 2.0**-22 * inputs**0.5 * walk).all()
        some = [rng.randrange(rows) for _ in range(rng.randint(1, 50))] if rows else []
        assert torch.equal(product(x[some]), found[some])
    with pytest.raises(ValueError, match="not \\[M, "):
        module.dense_linear(torch.randn(2, 8).to(dtype), weight)
    with pytest.raises(ValueError, match="float64"):
        module.dense_linear(x.double(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_segments_of_a_dense_product(module: ModuleType, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for count in range(1, 9):
        edges = [0, *(32 * edge for edge in sorted(rng.sample(range(1, 20), count - 1))), 640]
        weight, x = torch.randn(rng.randint(1, 80), 640).to(dtype), torch.randn(rng.choice([1, 7, 140]), 640).to(dtype)
        parts = [Dense(weight[:, a:b], module)(x[:, a:b], torch.float32) for a, b in pairwise(edges)]
        product = Dense(weight, module, edges[1:-1])
        assert torch.equal(product(x, torch.float32), branches(parts))
        assert count == 1 or torch.equal(product(x), branches(parts).to(dtype))
    odd, x = torch.randn(9, 99).to(dtype), torch.randn(3, 99).to(dtype)
    found, exact = Dense(odd, module, [13, 50])(x, torch.float32), x.double() @ odd.double().t()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("four", [True, False])
def test_a_sum_has_the_same_bits_on_any_ranks(four: bool, one_thread: None, seed: int) -> None:
    """Of 13 groups or heads: no rank has as much as the next."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    kernels = select(torch.device("cpu"))
    inputs, outputs = 13 * 32, rng.randint(30, 200)
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    x = torch.randn(1, rng.randint(1, 40), inputs).bfloat16()
    parts = segments(lambda size: spans(inputs, 32, size))

    def work(comm: Communicator) -> torch.Tensor:
        rows = Rows("", spans(inputs, 32, comm.size)[comm.rank], parts)
        mine = weight[:, rows.span.start : rows.span.stop]
        product = Dense(mine, kernels, rows.borders)
        if four:
            product = Int4(kernels.pack_int4(quantize(mine, 32, True), "int8"), kernels, rows.borders)
        return RowParallel(product, bias, comm, taken=rows.span)(x)

    (alone,) = on_ranks(1, work)
    for size in (2, 4, 8):
        assert all(torch.equal(found, alone) for found in on_ranks(size, work))


def test_a_neighbour_that_is_not_finite_harms_nobody(seed: int) -> None:
    torch.manual_seed(seed)
    product = Dense(torch.randn(40, 64).bfloat16())
    x = torch.randn(20, 64).bfloat16()
    clean = product(x)
    x[3], x[17, 5] = torch.inf, torch.nan
    found = product(x)
    rows = [r for r in range(20) if r not in (3, 17)]
    assert torch.equal(found[rows], clean[rows]) and found[17].isnan().all() and not found[3].isfinite().any()
