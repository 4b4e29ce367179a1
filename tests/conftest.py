"""What all tests share."""

import os
import secrets

import pytest

if not os.path.exists("/dev/nvidia0"):
    # Before anything imports triton, whose own functions ask for it once: kernels for GPUs run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def seed() -> int:
    """A fresh number for each test, printed when it fails; `QUASAR_SEED` sets it to run a failure again."""
    value = int(os.environ.get("QUASAR_SEED") or secrets.randbits(31))
    print(f"QUASAR_SEED={value}")
    return value


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded models keep transformers' layers, whose linears can be found by their paths."""
    monkeypatch.setattr("runtime.model.fuse", lambda *arguments: None)
