"""The GPU's int4 product against float64, the tables of tuned parameters, and the choice of a module."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime import kernels
from runtime.kernels import reference
from runtime.kernels.packed import PackedInt4
from runtime.pages import Pages
from runtime.quantize import int4
from runtime.quantize.int4 import Int4Weight
from tests.on_triton import DEVICE, DTYPES, MODULE, TABLE, gpu, needs_gpu, pack, quiet, tables, there

from runtime.kernels.gpu import linear  # isort: skip

ROOT = Path(__file__).parent.parent
pytestmark = quiet


def random_weight(outputs: int, inputs: int, size: int, symmetric: bool) -> Int4Weight:
    """Codes, scales and zeros that no quantiser made."""
    shape = outputs, inputs // size
    zero = torch.full(shape, 8) if symmetric else torch.randint(0, 16, shape)
    scale = torch.rand(shape) * 3
    return Int4Weight(torch.randint(0, 16, (outputs, inputs)).to(torch.uint8), scale, zero.to(torch.uint8), size)


def check_product(x: Tensor, weight: Int4Weight, result: Tensor) -> None:
    groups = weight.codes.view(*weight.scale.shape, -1).double() - weight.zero[..., None].double()
    full = (groups * weight.scale[..., None].double()).view(weight.codes.shape)
    exact = x.double() @ full.t()
    room = x.double().abs() @ full.abs().t() * 2e-6 + torch.finfo(x.dtype).eps * exact.abs()
    assert result.dtype == x.dtype and result.shape == exact.shape
    assert bool(((result.double() - exact).abs() <= room).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 64, 128, 96, 256, 320])
def test_products_are_near_the_exact_ones(size: int, symmetric: bool, dtype: torch.dtype, seed: int) -> None:
    """320 inputs in one group, and other numbers of inputs that end within a block and after a piece."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    inputs = size * rng.choice([n for n in (1, 2, 3, 5, 7, 11, 36) if n * size <= 1200 and (size < 320 or n == 1)])
    weight = random_weight(rng.choice([1, 5, 63, 64, 70, 130]), inputs, size, symmetric)
    x = (torch.randn(rng.choice([1, 2, 7, 16, 17]), inputs) * 10 ** rng.uniform(-2, 0)).to(dtype)
    check_product(x, weight, MODULE.int4_linear(x, pack(weight)))


def test_a_row_of_a_product_is_alone_however_the_work_is_spread(seed: int) -> None:
    """In tiles of 16 to 128 rows, a program for each piece or one for all, and wide and narrow tiles of outputs."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    weight = random_weight(66, 2208, 32, symmetric=False)  # three pieces, the last of one block that isn't full
    packed = pack(weight)
    x = torch.randn(130, 2208).bfloat16()

    def run(which: list[int], programs: int, outputs: int) -> Tensor:
        product = {rows: dataclasses.replace(tile, outputs=outputs) for rows, tile in TABLE.product.items()}
        table = dataclasses.replace(TABLE, programs=programs, product=product)
        return there(linear.multiply)(x[which], packed, None, table)

    whole = run(list(range(130)), 1, 64)
    check_product(x, weight, whole)
    for count, programs, outputs in ((1, 1, 64), (1, 999, 64), (9, 999, 128), (20, 1, 64), (40, 999, 64)):
        which = [rng.randrange(130) for _ in range(count)]
        assert torch.equal(run(which, programs, outputs), whole[which]), (count, programs, outputs)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_at_the_end_of_a_product(activation: str, seed: int) -> None:
    """By the program that has the sums, or by the one that adds the pieces: the bits of the product and then the gates."""
    torch.manual_seed(seed)
    for outputs, inputs, dtype in ((2 * 33, 1120, torch.bfloat16), (2 * 80, 64, torch.float32), (2, 96, torch.float16)):
        packed = pack(random_weight(outputs, inputs, 32, symmetric=False))
        x = (torch.randn(5, inputs) / inputs).to(dtype)
        wanted = MODULE.gated(MODULE.int4_linear(x, packed), activation)
        for programs in (1, 999):
            table = dataclasses.replace(TABLE, programs=programs)
            assert torch.equal(there(linear.multiply)(x, packed, activation, table), wanted)
    with pytest.raises(ValueError, match="activations are"):
        MODULE.int4_linear(x, packed, "relu")


def test_a_row_with_nan_harms_no_other(seed: int) -> None:
    torch.manual_seed(seed)
    packed = pack(random_weight(20, 256, 64, symmetric=True))
    x = torch.randn(3, 256).half()
    clean = MODULE.int4_linear(x, packed)
    x[1, 200] = torch.nan
    hurt = MODULE.int4_linear(x, packed)
    assert torch.equal(hurt[[0, 2]], clean[[0, 2]]) and bool(hurt[1].isnan().all())


def test_slices_of_a_weight_make_slices_of_a_product(seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = random_weight(150, 512, 64, symmetric=False), torch.randn(5, 1024).half()[:, 256:768]
    whole = MODULE.int4_linear(x, pack(weight))  # and rows with gaps between them
    parts = [MODULE.int4_linear(x, pack(weight.rows(s))) for s in (slice(0, 33), slice(33, 150))]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_nothing_in_nothing_out() -> None:
    weight = int4.quantize(torch.randn(20, 64), 32, symmetric=True)
    assert MODULE.int4_linear(torch.zeros(0, 64).half(), pack(weight)).shape == (0, 20)
    assert MODULE.int4_linear(torch.ones(3, 64).half(), pack(weight.rows(slice(0, 0)))).shape == (3, 0)
    nothing = MODULE.int4_linear(torch.zeros(3, 0).half(), pack(weight.groups(slice(0, 0))))
    assert torch.equal(nothing, torch.zeros(3, 20).half())


def test_what_has_no_fast_kernel_is_the_reference(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 96)
    for size, activations in ((24, "16bit"), (32, "int8")):
        weight = random_weight(10, 96, size, symmetric=False)
        expected = reference.int4_linear(x, reference.pack_int4(weight, activations))
        torch.testing.assert_close(MODULE.int4_linear(x, pack(weight, activations)), expected)
    with pytest.raises(ValueError, match="int8, 16bit"):
        pack(weight, "int7")
    with pytest.raises(ValueError, match="96"):
        MODULE.int4_linear(x[:, :95], pack(weight))


@pytest.mark.parametrize("path", sorted(tables.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_can_be_read(path: Path) -> None:
    assert 16 in tables.parse(path.read_text()).product and path.stem in ("default", tables.slug(path.stem))


@pytest.mark.parametrize(("card", "capability", "rows"), [("Some A100", (8, 0), 64), ("Some H100", (9, 0), 128)])
def test_a_card_without_a_table_gets_its_generation_s(
    card: str, capability: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    table = tables.table_of.__wrapped__(torch.device("cuda"))
    assert max(table.product) == rows and table.tile(table.product, 999, 128)[0] == rows
    assert [table.tile(table.dense, *size)[0] for size in ((17, 128), (999, 128), (999, 64), (2, 16))] == [32, 128, 64, 16]


@pytest.mark.parametrize("text", ["{}", "[]", '{"product": {"17": {"outputs": 64, "warps": 4, "stages": 3}}}', "x"])
def test_broken_tables_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        tables.parse(text)
    default = (tables.FOLDER / "default.json").read_text()
    with pytest.raises(ValueError, match="64, 128"):
        tables.parse(default.replace('"outputs": 64', '"outputs": 32'))


def test_without_triton_the_reference_steps_in_with_one_warning() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from runtime import kernels\n"
        "print(*{kernels.select(torch.device(d)).__name__ for d in ('cuda', 'cuda:0', 'cuda:1')})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "runtime.kernels.reference", done.stderr
    assert done.stderr.count("falling back") == 1 and "triton" in done.stderr


def test_with_triton_a_gpu_gets_its_kernels() -> None:
    assert kernels.select(torch.device("cuda")) is gpu
    assert all(callable(getattr(reference, name)) for name in gpu.__all__)


def test_the_compiler_takes_what_the_interpreter_takes(tmp_path: Path) -> None:
    """For a device that needn't be there."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_variants"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-4000:]


@pytest.mark.gpu
@needs_gpu
def test_a_row_is_alone_at_a_real_size(seed: int) -> None:
    """Every tile of rows the table knows, at shapes of an 8B model: what the instructions do, not only our division."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for outputs, inputs in ((6144, 4096), (4096, 12288), (5120, 1024)):
        packed = pack(random_weight(outputs, inputs, 128, symmetric=False))
        x = torch.randn(300, inputs, device=DEVICE).bfloat16()
        whole = gpu.int4_linear(x, packed)
        for count in (1, 2, 5, 8, 16, 17, 32, 33, 64, 65, 128, 129, 200):
            which = [rng.randrange(300) for _ in range(count)]
            assert torch.equal(gpu.int4_linear(x[which], packed), whole[which]), (outputs, inputs, count)


def test_packed_pieces_are_joined(seed: int) -> None:
    torch.manual_seed(seed)
    pieces = [random_weight(rows, 96, 32, symmetric) for rows, symmetric in ((16, True), (32, False), (3, True))]
    whole, joined = pack(int4.merge(pieces)), PackedInt4.join([pack(piece) for piece in pieces], 51, Pages())
    assert joined.zero is not None and whole.zero is not None and joined.out_features == 51
    for a, b in ((joined.codes, whole.codes), (joined.scale, whole.scale), (joined.zero, whole.zero)):
        assert torch.equal(a, b)
