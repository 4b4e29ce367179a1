"""The cache and paged attention: against brute force in float64, and a row has the same bits in any company."""

import importlib
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.rows import EIGHT_BITS, cache_width, decode, encode

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case:
    """Sequences of random lengths in a shuffled cache, and rows at random positions of them."""

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        self.kv = rng.choice([1, 2, 3])
        self.heads = self.kv * rng.choice([1, 2, 3, 5, 8])
        self.dim = rng.choice([8, 16, 24, 64, 80, 128])
        self.block = rng.choice([1, 4, 16, 32, 48, 64, 128])
        self.lengths = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 5))]
        self.window = rng.choice([0, 0, 1, 7, 64, 100])
        self.cap = rng.choice([0.0, 0.0, 5.0])
        self.scale = rng.choice([self.dim**-0.5, 0.3])
        self.sinks = torch.randn(self.heads) if rng.random() < 0.3 else None
        most = max(math.ceil(n / self.block) for n in self.lengths)
        used = [math.ceil(n / self.block) for n in self.lengths]
        total = sum(used) + 2
        order = torch.randperm(total).tolist()
        self.tables = torch.full((len(self.lengths), most), -1, dtype=torch.int32)
        for r, n in enumerate(used):
            self.tables[r, :n] = torch.tensor([order.pop() for _ in range(n)])
        self.form = rng.choice([dtype, dtype, *EIGHT_BITS.values()])
        shape = (total, self.kv, self.block, cache_width(self.dim, self.form) * self.form.itemsize)
        # Places that nobody wrote hold NaN: whoever looks at one is found out.
        self.key_cache = torch.full(shape, 255, dtype=torch.uint8).view(self.form)
        self.value_cache = torch.full(shape, 255, dtype=torch.uint8).view(self.form)
        rows: list[tuple[int, int]] = []
        for r, n in enumerate(self.lengths):
            width = min(n, rng.choice([1, 2, 4, 9, 20]))
            rows += [(r, n - width + i) for i in range(width)]
        if rng.random() < 0.5:
            rng.shuffle(rows)
        if rng.random() < 0.5:
            rows += [(0, -1)] * rng.randrange(1, 4)
        self.rows = torch.tensor([r for r, _ in rows], dtype=torch.int32)
        self.positions = torch.tensor([p for _, p in rows], dtype=torch.int32)
        self.query = (torch.randn(len(rows), self.heads, self.dim) * rng.choice([1.0, 3.0])).to(dtype)

    def fill(self, module: ModuleType) -> list[tuple[Tensor, Tensor]]:
        """Writes the sequences' keys and values [n, KV, D] through the tables and returns them as they are held."""
        kept = []
        for r, n in enumerate(self.lengths):
            key, value = torch.randn(2, n, self.kv, self.dim).to(self.query.dtype).unbind()
            places = torch.arange(n)
            slots = self.tables[r][places // self.block].long() * self.block + places % self.block
            skipped = torch.randn(3, self.kv, self.dim).to(key)
            module.write_cache(
                torch.cat([key, skipped]), torch.cat([value, skipped]), self.key_cache, self.value_cache,
                torch.cat([slots, torch.tensor([-1, -1, -5])]),
            )  # fmt: skip
            if self.form in EIGHT_BITS.values():
                key, value = (decode(encode(x.float(), self.form)) for x in (key, value))
            kept.append((key, value))
        return kept

    def run(self, module: ModuleType, which: list[int] | None = None) -> Tensor:
        pick = torch.arange(len(self.rows)) if which is None else torch.tensor(which, dtype=torch.long)
        return module.paged_attention(
            self.query[pick], self.key_cache, self.value_cache, self.tables, self.rows[pick], self.positions[pick],
            self.scale, self.window, self.cap, self.sinks,
        )  # fmt: skip

    def exact(self, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        out = torch.zeros(len(self.rows), self.heads, self.dim, dtype=torch.float64)
        for t, (r, p) in enumerate(zip(self.rows.tolist(), self.positions.tolist(), strict=True)):
            if p < 0:
                continue
            first = max(0, p + 1 - self.window) if self.window else 0
            key, value = (x[first : p + 1].double().repeat_interleave(self.heads // self.kv, dim=1) for x in kept[r])
            score = torch.einsum("hd,shd->hs", self.query[t].double(), key) * self.scale
            if self.cap:
                score = self.cap * torch.tanh(score / self.cap)
            if self.sinks is not None:
                score = torch.cat([score, self.sinks.double()[:, None]], dim=1)
            weight = score.softmax(-1)[:, : p + 1 - first]
            out[t] = torch.einsum("hs,shd->hd", weight, value)
        return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_is_right_and_its_rows_are_alone(module: ModuleType, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6 if module is reference else 40):
        case = Case(rng, dtype)
        expected = case.exact(case.fill(module))
        result = case.run(module)
        assert result.dtype == dtype and result.shape == expected.shape
        assert (result.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max())
        count = len(case.rows)
        one = rng.randrange(count)
        assert torch.equal(case.run(module, [one])[0], result[one])
        some = [rng.randrange(count) for _ in range(rng.randrange(1, 2 * count + 1))]
        assert torch.equal(case.run(module, some), result[some])


@pytest.mark.parametrize("form", EIGHT_BITS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_eight_bits_are_the_same_bytes_everywhere(
    module: ModuleType, dtype: torch.dtype, form: str, seed: int
) -> None:  # fmt: skip
    """Rounded to the nearest code, with a scale behind them; what isn't finite spoils its own row."""
    torch.manual_seed(seed)
    x = (torch.randn(9, 3, 24) * 10 ** (torch.rand(9, 3, 1) * 6 - 4)).to(dtype)
    x[0] = 0
    x[1, 0, 5], x[1, 1, 5] = math.nan, -math.inf
    x[2, :, 4:] = 1e-3 * x[2, :, 4:]  # next to a large number: the small steps of a float
    x[2, :, :4] = 3.0
    cache = torch.zeros(2, 3, 3, 4, cache_width(24, EIGHT_BITS[form]), dtype=torch.uint8).view(EIGHT_BITS[form])
    module.write_cache(x, x, cache[0], cache[1], torch.arange(9) + 1)
    assert torch.equal(cache[0].view(torch.uint8), cache[1].view(torch.uint8))
    rows = cache[0].view(torch.uint8).transpose(1, 2).reshape(12, 3, -1)
    assert torch.equal(rows[1:10], encode(x.float(), EIGHT_BITS[form]).view(torch.uint8)) and not rows[[0, 10, 11]].any()
    back = decode(rows[1:10].contiguous().view(EIGHT_BITS[form]))
    assert back[1, :2].isnan().all() and torch.equal(back[0], torch.zeros(3, 24))
    good = torch.ones(9, 3, dtype=torch.bool)
    good[1, :2] = False
    exact, amax = x[good].double(), x[good].double().abs().amax(-1, keepdim=True)
    room = amax / 253 if form == "int8" else (exact.abs() / 15.9).maximum(amax / 448 / 1000)
    assert bool(((back[good].double() - exact).abs() <= room).all())


def test_attention_does_not_depend_on_threads(module: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    try:
        for _ in range(3):
            case = Case(rng, torch.bfloat16)
            case.fill(module)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(case.run(module))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_a_neighbour_with_nan_harms_nobody(module: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    cache = torch.randn(2, 2, 1, 16, 16)
    query = torch.randn(3, 4, 16)
    tables, rows = torch.tensor([[1, 0]], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    positions = torch.tensor([17, 18, 19], dtype=torch.int32)

    def run() -> Tensor:
        return module.paged_attention(query, cache[0], cache[1], tables, rows, positions, 0.25)

    clean = run()
    cache[:, 0, :, 3] = math.nan  # position 19
    query[1] = math.inf
    assert torch.equal(run()[0], clean[0]) and run()[1].isnan().all() and run()[2].isnan().all()


def test_wrong_arguments_are_named(module: ModuleType) -> None:
    cache = torch.zeros(2, 1, 4, 8)
    query, table = torch.zeros(1, 2, 8), torch.tensor([[0, 1]], dtype=torch.int32)
    row, here = torch.zeros(1, dtype=torch.int32), torch.tensor([7], dtype=torch.int32)

    def run(q: Tensor = query, t: Tensor = table, r: Tensor = row, p: Tensor = here) -> Tensor:
        return module.paged_attention(q, cache, cache, t, r, p, 1.0)

    run()
    with pytest.raises(IndexError, match="position 8"):
        run(p=here + 1)
    with pytest.raises(IndexError, match="block"):
        run(t=table + 1)
    with pytest.raises(IndexError):
        run(r=row + 1)
    with pytest.raises(ValueError, match="dtype"):
        run(q=query.half())
    with pytest.raises(ValueError, match="int32"):
        run(p=here.long())
    assert run(q=query[:0], r=row[:0], p=here[:0]).shape == (0, 2, 8)
    with pytest.raises(IndexError, match="slot 8"):
        module.write_cache(query[:, :1], query[:, :1], cache, cache.clone(), torch.tensor([8]))
    with pytest.raises(ValueError, match="rows of 8"):
        module.write_cache(query[:, :1], query[:, :1], cache.to(torch.int8), cache.to(torch.int8), torch.tensor([0]))


def test_the_reference_steps_in_with_one_clear_warning(tmp_path: Path) -> None:
    """Without a compiler; and starting the interpreter by its path, with an empty PATH, finds ninja all the same."""
    code = (
        "import torch; from runtime import kernels; [kernels.select(torch.device('cpu')) for _ in range(3)];"
        "print(kernels.select(torch.device('cpu')).__name__)"
    )
    environment = {**os.environ, "QUASAR_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "runtime.kernels.reference", done.stderr
    assert done.stderr.count("falling back") == 1 and "apt-get install g++" in done.stderr


@pytest.mark.parametrize("module", ["cpu", "gpu"])
def test_every_module_has_every_operation(module: str) -> None:
    if module == "gpu":
        pytest.importorskip("triton")
    kernels = importlib.import_module(f"runtime.kernels.{module}")
    assert not [name for name in reference.__all__ if not callable(getattr(kernels, name, None))]
