"""What all tests share."""

import os
import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.seeds import fresh_seed

if not os.path.exists("/dev/nvidia0"):
    # Before anything imports triton, whose own functions ask for it once: kernels for GPUs run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def seed() -> int:
    """A fresh number for each test, printed when it fails; `QUASAR_SEED` sets it to run a failure again."""
    return fresh_seed()


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded models keep transformers' layers, whose linears can be found by their paths."""
    monkeypatch.setattr("runtime.model.fuse", lambda *arguments: None)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read and packed sixteen rows at a time, as they are in more pieces than one where they are large."""
    monkeypatch.setattr("runtime.products.PIECE", 1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of small tensors, while other tests want the cores too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def one_or_two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpu"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The kernels in plain torch, and those for a CPU."""
    import torch

    from runtime import kernels
    from runtime.kernels import reference

    if request.param == "reference":
        return reference
    chosen = kernels.select(torch.device("cpu"))
    if chosen is reference:
        assert shutil.which(os.environ.get("CXX", "c++")) is None, "there is a compiler, and yet nothing was built"
        pytest.skip("the C++ kernels can't be built here")
    return chosen
