"""Tuned parameters: a JSON file for each device under `runtime/kernels/tuned/`, made by `python -m bench.tune`.

They say how the work is spread over a device and never what is added in which order: a table changes the time a kernel
takes and not one bit of its result. A device without a file of its own gets its generation's (`sm-90.json`), or else
`default.json`; nothing is tuned at start.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent.parent / "tuned"


@dataclass(frozen=True)
class Tile:
    """How one program of a product works: outputs of its tile, warps, and loads under way at once."""

    outputs: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        # From 64 outputs on every row tile uses one kind of matrix instruction; see linear.py.
        if self.outputs not in (64, 128, 256) or self.warps not in (4, 8) or not 1 <= self.stages <= 8:
            raise ValueError(f"a tile has 64, 128 or 256 outputs, 4 or 8 warps and 1 to 8 stages, not {self}")


@dataclass(frozen=True)
class Launch:
    """Warps of a program, and loads under way at once."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Table:
    """product, dense: rows of a tile (16, 32, 64, 128) -> Tile, for weights of four bits, and of eight and sixteen.
    programs: fewer than so many leave the device idle. attention: rows of a tile (16, 32) -> Launch."""

    product: dict[int, Tile]
    dense: dict[int, Tile]
    programs: int
    attention: dict[int, Launch]

    @staticmethod
    def tile(tiles: dict[int, Tile], rows: int, most: int) -> tuple[int, Tile]:
        """The least tile that holds so many rows, or the largest; none of more than `most`, which is 16 at least."""
        known = [high for high in tiles if high <= most]
        high = min((high for high in known if high >= rows), default=max(known))
        return high, tiles[high]


def parse(text: str) -> Table:
    """Reads a table. Raises ValueError for anything that isn't one."""
    data: dict[str, Any] = json.loads(text)
    try:
        product, dense = (
            {int(rows): Tile(**tile) for rows, tile in data[name].items()} for name in ("product", "dense")
        )
        attention = {int(rows): Launch(**launch) for rows, launch in data["attention"].items()}
        table = Table(product, dense, int(data["programs"]), attention)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a table of tuned parameters: {error!r}") from error
    if any(not set(rows) <= {16, 32, 64, 128} or 16 not in rows for rows in (product, dense)) or table.programs < 1:
        raise ValueError("row tiles are 16 and some of 32, 64 and 128; programs is 1 or more")
    if set(table.attention) != {16, 32}:
        raise ValueError("attention has tiles of 16 and of 32 rows")
    return table


def slug(name: str) -> str:
    """A device's name as a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def table_of(device: torch.device) -> Table:
    """A device's own table, its generation's, or the default. Raises ValueError for a broken one."""
    names = ["default"]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        names = [slug(torch.cuda.get_device_name(device)), f"sm-{major}{minor}", *names]
    return parse(next(path for name in names if (path := FOLDER / f"{name}.json").exists()).read_text())
