"""Makes products out of this rank's slices of a checkpoint's weights, a piece at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import ModelConfig
from runtime.belt import Belt
from runtime.checkpoint import Checkpoint, ModelError
from runtime.comm import Communicator
from runtime.kernels.packed import PackedInt4, PackedInt8
from runtime.linear import Dense, Int4, Int8, Product, Reordered, Stacked
from runtime.pages import Pages
from runtime.quantize.int4 import Int4Weight, merge
from runtime.quantize.int8 import quantize as quantize_int8
from runtime.quantize.schemes import Scheme
from runtime.quantize.stored import Order, expand, order_of, read_int4
from runtime.screened import Screened
from runtime.shard import Span

PIECE = 1 << 20  # weights that are worked on at a time, so that little is in memory beside what is finished
ROWS = 32  # of which a packed piece has a multiple

Part = tuple[str, Span, Span]  # a linear's path, and the rows and columns of its weight


@dataclass
class Products:
    """Products of the linears of a skeleton. Beside what it has finished it holds less than one source tensor.

    belt: what brings dense weights of layers from host memory, where they stay; None keeps them on the device.
    """

    module: PreTrainedModel
    config: ModelConfig
    checkpoint: Checkpoint
    kernels: ModuleType
    dtype: torch.dtype
    device: torch.device
    schemes: dict[str, Scheme]
    comm: Communicator
    belt: Belt | None = None
    pages: Pages = field(default_factory=Pages)
    _sorted: tuple[str, Span, Order | None] | None = None  # of the linear that was read last

    def head(self, path: str, stored: str, span: Span, table: Tensor | None) -> Product:
        """The head's product; `table` is the embedding's weight if it is the head's too; `stored`: its name in the files."""
        part = path, span, self.inputs(path)
        if path in self.schemes and self.config.quantization == "int4":  # stored quantised, and so it stays
            return self.of([part])
        how = self._head_by(path) if self.config.lm_head == "auto" else self.config.lm_head
        if how == "screened" and self.linear(path).bias is not None:
            raise ModelError(f"{path} has a bias, which model.lm_head: screened doesn't look at; use int8 or 16bit")
        if how == "16bit":
            return Dense(self._filled([part]) if table is None else table, self.kernels)
        # From the file's own values.
        pieces = (self._stored_rows(path, stored, rows) for piece in cut([part]) for _, rows, _ in piece)
        kernels = self.kernels
        try:
            if how == "int8":  # each row with a scale of its own
                eights = [kernels.pack_int8(quantize_int8(piece)) for piece in pieces]
                return Int8(PackedInt8.join(eights, self.pages), kernels)
            return self._screened(part, pieces, table)
        except ValueError as error:
            raise ModelError(f"{stored} cannot be quantised: {error}; use model.lm_head: 16bit") from error

    def _head_by(self, path: str) -> str:
        """What `lm_head: auto` is: a GPU has the bandwidth, and a bias would go unseen."""
        fits = self.device.type == "cpu" and self.linear(path).bias is None
        fits = fits and self.inputs(path).width % self.config.group_size == 0
        return "screened" if fits and self.config.quantization == "int4" else "16bit"

    def _screened(self, part: Part, pieces: Iterator[Tensor], table: Tensor | None) -> Screened:
        """pieces: of the head's rows, as the files have them."""
        errors = torch.empty(part[1].width, dtype=torch.float32, device=self.device)  # in one, so that no piece leaves a hole

        def rounded() -> Iterator[PackedInt4]:
            start = 0
            for piece in pieces:
                four = self.kernels.quantize_int4(piece, self.config.group_size, self.config.symmetric)
                torch.mean((four.dequantize() - piece.float()).square_(), 1, out=errors[start : start + len(piece)])
                start += len(piece)
                yield self.kernels.pack_int4(four, self.config.activations)

        packed = PackedInt4.join(rounded(), part[1].width, self.pages)
        weight = self._filled([part]) if table is None else table
        kept = weight.nbytes if table is None else 0
        return Screened(Int4(packed, self.kernels), weight, errors.sqrt_(), self.kernels, self.comm, kept)

    def whole(self, part: Part) -> Product:
        """Of a linear that every rank holds in full, in the model's dtype."""
        return self._dense(part[0], self._filled([part]))

    def _stored_rows(self, path: str, stored: str, rows: Span) -> Tensor:
        """Rows of the head as precisely as the files have them."""
        return self._weight(path, rows, self.inputs(path)) if path in self.schemes else self._slice(stored, rows)

    def of(self, parts: list[Part], borders: Sequence[int] = ()) -> Product:
        """One product of slices, laid one under the other; borders: between segments."""
        firsts = [self._part(path, Span(rows.start, min(rows.start + 1, rows.stop)), columns) for path, rows, columns in parts]
        if all(isinstance(weight, Tensor) for weight, _ in firsts):
            return self._dense(parts[0][0], self._filled(parts), borders)
        fours = [weight for weight, _ in firsts if isinstance(weight, Int4Weight)]
        order = firsts[0][1]
        if len(fours) < len(parts) or len({w.group_size for w in fours}) > 1 or not all(_same(o, order) for _, o in firsts):
            return Stacked([self.of([part]) for part in parts])
        pieces = (self.kernels.pack_int4(self._four(piece), self.config.activations) for piece in cut(parts))
        packed = PackedInt4.join(pieces, sum(rows.width for _, rows, _ in parts), self.pages)
        if order is None:
            return Int4(packed, self.kernels, borders)
        # Sorted by group: segments don't lie together.
        return Reordered(Int4(packed, self.kernels), order, parts[0][2].width)

    def _four(self, parts: list[Part]) -> Int4Weight:
        """Slices that are held in four bits, alike, laid one under the other."""
        return merge([weight for weight, _ in (self._part(*part) for part in parts) if isinstance(weight, Int4Weight)])

    def _filled(self, parts: list[Part]) -> Tensor:
        """Slices in the model's dtype, laid one under the other."""
        whole = self.pages.empty((sum(part[1].width for part in parts), parts[0][2].width), self.dtype, self.device)
        start = 0
        for path, rows, columns in (part for piece in cut(parts) for part in piece):
            whole[start : start + rows.width].copy_(self._weight(path, rows, columns))
            start += rows.width
        return whole

    def _dense(self, path: str, weight: Tensor, borders: Sequence[int] = ()) -> Product:
        """A weight of a linear, or of those with which it stands in one layer; layers have numbers in their paths."""
        layer = re.search(r"\.(\d+)\.", path)
        if self.belt is None or layer is None:
            return Dense(weight, self.kernels, borders)
        return self.belt.carry(int(layer[1]), weight, self.kernels, borders)

    def _part(self, path: str, rows: Span, columns: Span) -> tuple[Tensor | Int4Weight, Tensor | None]:
        """A linear's slice as it is held, and the order of its inputs if that isn't their own."""
        if self.config.quantization == "none" or (self.schemes and path not in self.schemes):
            return self._weight(path, rows, columns), None
        if path in self.schemes:
            self._no_hidden_bias(path)
            weight, order = self._read_int4(path, rows, columns)
            return weight.to(self.device), None if order is None else order.to(self.device)
        return self._quantised(f"{path}.weight", rows, columns), None

    def _weight(self, path: str, rows: Span, columns: Span) -> Tensor:
        """A linear's slice, expanded if it is stored in four bits. It may be the mapped file itself."""
        if path not in self.schemes:
            return self._slice(f"{path}.weight", rows, columns)
        return expand(*self._read_int4(path, rows, columns), columns.width).to(self.device)

    def _read_int4(self, path: str, rows: Span, columns: Span) -> tuple[Int4Weight, Tensor | None]:
        if self._sorted is None or self._sorted[:2] != (path, columns):  # pieces of one linear follow each other
            self._sorted = path, columns, order_of(self.checkpoint, path, self.schemes[path], columns)
        return read_int4(self.checkpoint, path, self.schemes[path], rows, columns, self._sorted[2])

    def _quantised(self, name: str, rows: Span, columns: Span) -> Int4Weight:
        # Rounded from the file's own values, not from a narrower dtype.
        weight = self._slice(name, rows, columns)
        try:
            four: Int4Weight = self.kernels.quantize_int4(weight, self.config.group_size, self.config.symmetric)
            return four
        except ValueError as error:
            raise ModelError(
                f"{name} cannot be quantised: {error}; use another model.group_size, or quantization: none"
            ) from error

    def bias(self, paths: Sequence[str], spans: Sequence[Span | None]) -> Tensor | None:
        """The biases of linears that are computed together, zero for those without; None if none has one."""
        linears = [self.module.get_submodule(path) for path in paths]
        if all(linear.bias is None for linear in linears):
            return None
        return torch.cat([
            torch.zeros(span.width if span else linear.out_features, dtype=self.dtype, device=self.device)
            if linear.bias is None else self.read(f"{path}.bias", span)
            for path, span, linear in zip(paths, spans, linears, strict=True)
        ])  # fmt: skip

    def _no_hidden_bias(self, path: str) -> None:
        """Old GPTQ files give every linear a bias, of zeros where the model has none."""
        name = f"{path}.bias"
        if self.linear(path).bias is None and name in self.checkpoint.shapes and bool(self.checkpoint.read(name).any()):
            raise ModelError(f"{name} isn't zero, and the architecture has no such bias; the two don't belong together")

    def linear(self, path: str) -> nn.Linear:
        linear = self.module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return linear

    def outputs(self, path: str) -> Span:
        return Span(0, self.linear(path).out_features)

    def inputs(self, path: str) -> Span:
        return Span(0, self.linear(path).in_features)

    def _slice(self, name: str, rows: Span, columns: Span | None = None) -> Tensor:
        """A slice in the file's dtype, which may be the mapped file itself."""
        return self.checkpoint.read(name, rows, columns).to(self.device)

    def read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        # A copy: what safetensors returns may be the mapped file itself, unaligned and at the mercy of its owner.
        stored = self.checkpoint.read(name, rows, columns)
        return self.pages.empty(stored.shape, self.dtype, self.device).copy_(stored)


def cut(parts: list[Part]) -> Iterator[list[Part]]:
    """The same rows, in pieces of about PIECE weights that are multiples of ROWS, the last one apart."""
    most = max(1, PIECE // parts[0][2].width // ROWS) * ROWS
    piece: list[Part] = []
    room = most
    for path, rows, columns in parts:
        start = rows.start
        while start < rows.stop:
            stop = min(start + room, rows.stop)
            piece.append((path, Span(start, stop), columns))
            room -= stop - start
            start = stop
            if not room:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
