"""Where tests' random input comes from."""

from __future__ import annotations

import os
import secrets


def fresh_seed() -> int:
    """A number that differs from run to run, printed when a test fails; `QUASAR_SEED` sets it to run a failure again."""
    value = int(os.environ.get("QUASAR_SEED") or secrets.randbits(31))
    print(f"QUASAR_SEED={value}")
    return value
