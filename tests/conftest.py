"""What all tests share."""

import os
import secrets

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh number for each test, printed when it fails; `QUASAR_SEED` sets it to run a failure again."""
    value = int(os.environ.get("QUASAR_SEED") or secrets.randbits(31))
    print(f"QUASAR_SEED={value}")
    return value
