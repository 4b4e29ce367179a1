"""A model directory: its safetensors files, read slice by slice, and its small JSON files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.read_ahead import Extent
from runtime.shard import Span

ROWED = (".weight", ".weight_packed", ".weight_scale")  # tensors with a row for each output of a linear
INDEX = "model.safetensors.index.json"
SAMPLE = 64  # bytes of each tensor that count for the digest
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelError(RuntimeError):
    """A model directory cannot be used; the message names the file or tensor and says what to do."""


class Checkpoint:
    """The tensors of a model directory by name.

    Opening it reads the headers only: `shapes` and `dtypes` (keys of DTYPES, or others) are known, and torn or absent
    files found, before the first weight is read. Raises ModelError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._where: dict[str, Path] = {}
        self._offsets: dict[str, tuple[int, int]] = {}  # of its first byte in the file, and of the one after its last
        self._stored: dict[str, str] = {}  # names in the files, where they differ
        # Of tensors that lie in another: which slice, the first row of it, and whether its rows are the file's columns.
        self._slices: dict[str, tuple[int, int, bool]] = {}
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self._digest = hashlib.sha256()
        if not self.directory.is_dir():
            raise ModelError(f"{self.directory} is no directory; model.target names a downloaded Hugging Face model")
        for name in ("config.json", INDEX):
            if (self.directory / name).exists():
                self._digest.update((self.directory / name).read_bytes())
        promised = self._promised()
        for path in sorted(set(promised.values())) or self._single():
            self._read_header(path)
        for name, path in promised.items():
            if self._where.get(name) != path:
                raise ModelError(f"{self.directory / INDEX} says that {name} is in {path.name}, which has none; {AGAIN}")

    @property
    def digest(self) -> str:
        """Hex; the same for the same model: config, names, shapes, and some bytes of every tensor."""
        return self._digest.hexdigest()

    def rename(self, name_of: Callable[[str], str]) -> None:
        """Calls the tensors by other names: those of the architecture, where the files have older ones."""
        for old in list(self.shapes):
            if (new := name_of(old)) != old:
                self._stored[new] = old
                self.shapes[new], self.dtypes[new] = self.shapes.pop(old), self.dtypes.pop(old)
                self._where[new], self._offsets[new] = self._where.pop(old), self._offsets.pop(old)

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files; one that lies in another has its own name only here."""
        return name if name in self._slices else self._stored.get(name, name)

    def take_apart(self, name: str, parts: Sequence[Sequence[str]], turned: bool = False) -> None:
        """Sees a tensor [E, N, K], if it is here, as tensors [n, K] with names of their own: parts[e] are what lies, one
        under the other, in slice e. turned: it is stored as [E, K, N]."""
        shape = self.shapes.get(name, ())
        if len(shape) != 3 or shape[0] != len(parts) or shape[2 if turned else 1] % len(parts[0]):
            return
        width, height = shape[1:] if turned else shape[:0:-1]
        rows = height // len(parts[0])
        dtype, path, stored = self.dtypes.pop(name), self._where.pop(name), self._stored.pop(name, name)
        del self.shapes[name]
        first, last = self._offsets.pop(name)
        each = (last - first) // len(parts)
        for index, names in enumerate(parts):
            for place, part in enumerate(names):
                begin, size = first + index * each, each // len(names)
                self._offsets[part] = (begin, begin + each) if turned else (begin + place * size, begin + (place + 1) * size)
                self.shapes[part], self.dtypes[part], self._where[part] = (rows, width), dtype, path
                self._stored[part], self._slices[part] = stored, (index, place * rows, turned)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = (), integers: Mapping[str, str] | None = None
    ) -> None:
        """Raises ModelError unless exactly these tensors are here in these shapes; `ignored` names may be here too.

        integers: the dtypes of those that aren't floats, by name.
        """
        missing = sorted(set(expected) - set(self.shapes))
        if missing:
            raise ModelError(
                f"{self.directory} lacks {_some(missing)}, which its config.json asks for: the two don't belong "
                f"together, or the download is incomplete; {AGAIN}"
            )
        extra = sorted(set(self.shapes) - set(expected) - set(ignored))
        if extra:
            raise ModelError(
                f"{self.directory} has {_some(extra)}, which the architecture of its config.json doesn't know: a "
                "quantised or adapted checkpoint, or another model's config; use the plain 16-bit checkpoint"
            )
        for name, shape in expected.items():
            if self.shapes[name] != tuple(shape):
                raise ModelError(
                    f"{name} in {self._where[name]} is {list(self.shapes[name])}, its config.json makes it "
                    f"{list(shape)}: the two don't belong together; {AGAIN}"
                )
            kind = (integers or {}).get(name)
            if self.dtypes[name] not in ((kind,) if kind else DTYPES):
                raise ModelError(f"{name} in {self._where[name]} is {self.dtypes[name]}; use the plain 16-bit checkpoint")

    def read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """A tensor, or the named rows and columns of it, on the CPU in the file's dtype. Raises ModelError."""
        path, stored = self._where[name], self._stored.get(name, name)
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            if name in self._slices:
                index, start, turned = self._slices[name]
                rows = rows or Span(0, self.shapes[name][0])
                across = slice(*(columns or Span(0, self.shapes[name][1])))
                down = slice(start + rows.start, start + rows.stop)
                packed = self._open[path].get_slice(stored)
                inside: Tensor = packed[index, across, down].t() if turned else packed[index, down, across]
                return inside
            if rows is None and columns is None:
                whole: Tensor = self._open[path].get_tensor(stored)
                return whole
            picked = self._open[path].get_slice(stored)
            first = slice(None) if rows is None else slice(*rows)
            part: Tensor = picked[first] if columns is None else picked[first, slice(*columns)]
            return part
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{name} cannot be read from {path}: {error}; {AGAIN}") from error

    def extents(self, parts: Iterable[tuple[str, Span]]) -> list[Extent]:
        """Where the tensors of these modules lie, in order; of weights with a row for each output, where those rows do.

        parts: modules by path, and which of their outputs.
        """
        found = []
        for path, rows in parts:
            for name in self._modules.get(path, ()):
                first, last = self._offsets[name]
                turned = name in self._slices and self._slices[name][2]
                if name.endswith(ROWED) and len(self.shapes[name]) == 2 and not turned:
                    each = (last - first) // self.shapes[name][0]
                    first, last = first + each * rows.start, first + each * rows.stop
                found.append(Extent(self._where[name], first, last))
        return sorted(found)

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        """The names of the tensors of each module, by its path."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def _single(self) -> list[Path]:
        path = self.directory / "model.safetensors"
        if not path.exists():
            raise ModelError(
                f"{self.directory} has neither model.safetensors nor {INDEX}; use a checkpoint in safetensors format"
            )
        return [path]

    def _promised(self) -> dict[str, Path]:
        """What the index says: the file of each tensor. Empty without an index."""
        path = self.directory / INDEX
        if not path.exists():
            return {}
        try:
            names = json.loads(path.read_text())["weight_map"]
            promised = {name: self.directory / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not an index of safetensors files ({error}); {AGAIN}") from error
        for file in sorted(set(promised.values())):
            if file.parent != self.directory:
                raise ModelError(f"{path} names {file}, outside the model's directory")
            if not file.exists():
                raise ModelError(f"{file}, which {path.name} names, is not there; {AGAIN}")
        return promised

    def _read_header(self, path: Path) -> None:
        """Takes in what a file says of its tensors, and checks that it is as long as that needs."""
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if not 2 <= length <= min(size - 8, 1 << 30):
                    raise ValueError("its header is cut off")
                raw = file.read(length)
                header = json.loads(raw)
                header.pop("__metadata__", None)
                self._digest.update(raw)
                end = max((about["data_offsets"][1] for about in header.values()), default=0)
                if size != 8 + length + end:
                    raise ValueError(f"it has {size} bytes, its header speaks of {8 + length + end}")
                for name, about in header.items():
                    if name in self._where:
                        raise ValueError(f"{name} is also in {self._where[name].name}")
                    self._where[name] = path
                    self.shapes[name] = tuple(about["shape"])
                    self.dtypes[name] = about["dtype"]
                    first, last = about["data_offsets"]
                    self._offsets[name] = 8 + length + first, 8 + length + last
                    file.seek(8 + length + (first + last) // 2)
                    self._digest.update(file.read(min(SAMPLE, last - (first + last) // 2)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} cannot be used: {error}; {AGAIN}") from error


AGAIN = "download the model again"


def read_json(directory: str | Path, name: str) -> dict[str, Any]:
    """A JSON object of the directory, {} if there is no such file. Raises ModelError if it is something else."""
    path = Path(directory) / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no JSON object")
    return content


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
