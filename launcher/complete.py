"""Whether a run is done, by its files alone: `python -m launcher.complete` exits 0 if every request has its result.

A launcher's exit code cannot say so: `deepspeed` exits 0 when its own child is killed, and the ranks with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import exits
from configs.load import ConfigError, load
from launcher.batch import InputError, scan
from launcher.journal import ROW_ID, whole_row


def missing(input_path: Path, output_path: Path) -> tuple[int, int]:
    """(requests without a row in the output, requests). Raises InputError for an input that cannot be read."""
    found = bytearray(len(scan(input_path)))
    if output_path.exists():
        with output_path.open("rb") as file:
            for raw in file:
                row = whole_row(raw)
                name = ROW_ID.fullmatch(str(row.get("id"))) if row else None
                if name and int(name[1]) < len(found):
                    found[int(name[1])] = 1
    return found.count(0), len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the two files and says what is missing."""
    parser = argparse.ArgumentParser(prog="python -m launcher.complete", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="the run's configuration; only its files are looked at")
    parser.add_argument("--input", type=Path, help="batch file of requests; wins over files.input")
    parser.add_argument("--output", type=Path, help="results; wins over files.output")
    given = parser.parse_args(arguments)
    try:
        files = load(given.config).files if given.config else None
        input_path = given.input or (files and files.input)
        output_path = given.output or (files and files.output)
        if not input_path or not output_path:
            raise ConfigError("files.input and files.output: needed, here or as --input and --output")
        lacking, requests = missing(Path(input_path), Path(output_path))
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return exits.REFUSED
    if lacking:
        print(f"{lacking} of {requests} requests have no result in {output_path}: start the run again", file=sys.stderr)
        return exits.INCOMPLETE
    print(f"all {requests} requests have their result in {output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
