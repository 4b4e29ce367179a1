"""`python -m workers.keys DIR`: makes the CURVE keys of a job, one pair for the coordinator and one for its ranks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import zmq.auth

from workers.transport import CLIENT_KEYS, SERVER_KEYS


def make(directory: Path) -> None:
    """Writes both pairs, readable by their owner alone. Raises FileExistsError rather than replace keys in use."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if any(directory.glob("*.key*")):
        raise FileExistsError(f"{directory} holds keys already; choose an empty directory")
    for name in (SERVER_KEYS, CLIENT_KEYS):
        zmq.auth.create_certificates(directory, name)
        os.chmod(directory / f"{name}.key_secret", 0o600)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    make(parser.parse_args().directory)
