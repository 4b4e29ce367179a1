"""Puts this rank's slices of a checkpoint's weights into a model's skeleton."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import ModelConfig
from runtime.belt import Belt
from runtime.checkpoint import Checkpoint, ModelError
from runtime.comm import Communicator
from runtime.experts import Experts
from runtime.layout import Layout
from runtime.linear import (
    ColumnParallel,
    Dense,
    Int4,
    Int8,
    Product,
    Reordered,
    RowParallel,
    Siblings,
    Stacked,
    VocabEmbedding,
)  # fmt: skip
from runtime.quantize.int4 import Int4Weight, merge
from runtime.quantize.int8 import Int8Weight
from runtime.quantize.int8 import quantize as quantize_int8
from runtime.quantize.schemes import Scheme
from runtime.quantize.stored import expand, read_int4
from runtime.shard import Span
from runtime.skeleton import replace

HEAD_ROWS = 16384  # of a vocabulary that are rounded at a time

OnPart = Callable[[int, int], None]  # told how many parts of a model are loaded, of how many


@dataclass
class Loader:
    """Puts the weights of a checkpoint into a skeleton, one source tensor at a time.

    belt: what brings dense weights of layers from host memory, where they stay; None keeps them on the device.
    ranks_alike: whether, of what was put, every sum over ranks has the same bits on 1, 2, 4 and 8 ranks.
    """

    module: PreTrainedModel
    config: ModelConfig
    checkpoint: Checkpoint
    kernels: ModuleType
    dtype: torch.dtype
    device: torch.device
    comm: Communicator
    schemes: dict[str, Scheme]
    belt: Belt | None = None
    ranks_alike: bool = True

    def fill(self, layout: Layout, tied: dict[str, str], on_part: OnPart) -> int:
        """Replaces and fills all modules. Returns the bytes of weights held."""
        held = done = 0
        total = sum(len(parts) for parts in (layout.columns, layout.rows, layout.experts, layout.whole))
        comm = self.comm
        embedding = self.module.get_submodule(layout.embedding)
        assert isinstance(embedding, nn.Embedding)
        table = self._read(f"{layout.embedding}.weight", layout.embedding_span)
        embedding.weight = nn.Parameter(table, requires_grad=False)
        stored = tied.get(f"{layout.head}.weight", f"{layout.head}.weight")
        head = self._head(layout.head, stored, layout.head_span, table if f"{layout.head}.weight" in tied else None)
        head_bias = self._bias([layout.head], [layout.head_span])
        shared = isinstance(head, Dense) and head.weight.data_ptr() == table.data_ptr()
        held += table.nbytes + (0 if shared else head.nbytes) + (0 if head_bias is None else head_bias.nbytes)

        swaps: dict[str, nn.Module] = {
            layout.embedding: VocabEmbedding(embedding, layout.embedding_span, comm),
            layout.head: ColumnParallel(Siblings(head, [layout.head_span.width], head_bias)),
        }
        for columns in layout.columns:
            inputs = Span(0, self._linear(columns.paths[0]).in_features)
            product = self._product([(path, span, inputs) for path, span in zip(columns.paths, columns.spans, strict=True)])
            siblings = Siblings(product, [s.width for s in columns.spans], self._bias(columns.paths, columns.spans))
            held += siblings.nbytes
            for index, path in enumerate(columns.paths):
                swaps[path] = ColumnParallel(siblings, index, comm, columns.gathered)
            on_part(done := done + 1, total)
        for rows in layout.rows:
            outputs = Span(0, self._linear(rows.path).out_features)
            product = self._product([(rows.path, outputs, rows.span)], rows.borders if self.kernels.SEGMENTS else ())
            bias = self._bias([rows.path], [None])
            self.ranks_alike &= rows.complete and self._sums_by_segment(product, rows.segments)
            held += product.nbytes + (0 if bias is None else bias.nbytes)
            swaps[rows.path] = RowParallel(product, bias, comm, rows.span if rows.whole_input else None)
            on_part(done := done + 1, total)
        for share in layout.experts:
            experts: Experts = self.module.get_submodule(share.path)  # type: ignore[assignment]
            experts.keep(share.span, share.borders if self.kernels.SEGMENTS else (), comm)
            self.ranks_alike &= share.complete and self.kernels.SEGMENTS
            on_part(done := done + 1, total)
        for path in layout.whole:
            dense = self._dense(path, self._weight(path))
            siblings = Siblings(dense, [dense.out_features], self._bias([path], [None]))
            held += siblings.nbytes
            swaps[path] = ColumnParallel(siblings)
            on_part(done := done + 1, total)
        for path, swap in swaps.items():
            replace(self.module, path, swap)
        for path, spread in layout.spreads.items():
            self.module.get_submodule(path).spread = spread.to(self.device)  # type: ignore[assignment]
        return held + self._rest(layout.parameters) + (self.belt.start() if self.belt is not None else 0)

    def _head(self, path: str, stored: str, span: Span, table: Tensor | None) -> Product:
        """The head's product; `table` is the embedding's weight if it is the head's too; `stored`: its name in the files."""
        if path in self.schemes and self.config.quantization == "int4":  # stored quantised, and so it stays
            return self._product([(path, span, Span(0, self._linear(path).in_features))])
        if self.config.lm_head == "16bit":
            return Dense(self._weight(path, span) if table is None else table, self.kernels)
        # From the file's own values, some rows at a time: each has a scale of its own.
        starts = range(span.start, span.stop, HEAD_ROWS)
        pieces = (Span(start, min(start + HEAD_ROWS, span.stop)) for start in starts)
        try:
            parts = [quantize_int8(self._stored_rows(path, stored, piece)) for piece in pieces]
        except ValueError as error:
            raise ModelError(f"{stored} cannot be quantised: {error}; use model.lm_head: 16bit") from error
        whole = Int8Weight(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))
        return Int8(self.kernels.pack_int8(whole), self.kernels)

    def _stored_rows(self, path: str, stored: str, rows: Span) -> Tensor:
        """Rows of the head as precisely as the files have them."""
        return self._weight(path, rows) if path in self.schemes else self.checkpoint.read(stored, rows).to(self.device)

    def _product(self, parts: list[tuple[str, Span, Span]], borders: Sequence[int] = ()) -> Product:
        """One product of linears' slices (path, rows, columns), laid one under the other; borders: between segments."""
        made = [self._part(*part) for part in parts]
        if all(isinstance(weight, Tensor) for weight, _ in made):
            whole = torch.cat([weight for weight, _ in made if isinstance(weight, Tensor)])
            return self._dense(parts[0][0], whole, borders)
        fours = [weight for weight, _ in made if isinstance(weight, Int4Weight)]
        order, inputs = made[0][1], parts[0][2].width
        if len(fours) == len(made) and len({w.group_size for w in fours}) == 1 and all(_same(o, order) for _, o in made):
            return self._packed(merge(fours), order, inputs, borders)
        return Stacked([Dense(w, self.kernels) if isinstance(w, Tensor) else self._packed(w, o, inputs) for w, o in made])

    def _dense(self, path: str, weight: Tensor, borders: Sequence[int] = ()) -> Product:
        """A weight of a linear, or of those with which it stands in one layer; layers have numbers in their paths."""
        layer = re.search(r"\.(\d+)\.", path)
        if self.belt is None or layer is None:
            return Dense(weight, self.kernels, borders)
        return self.belt.carry(int(layer[1]), weight, self.kernels, borders)

    def _packed(
        self, weight: Int4Weight, order: Tensor | None, inputs: int, borders: Sequence[int] = ()
    ) -> Product:
        packed = self.kernels.pack_int4(weight, self.config.activations)
        if order is None:
            return Int4(packed, self.kernels, borders)
        return Reordered(Int4(packed, self.kernels), order, inputs)  # sorted by group: segments don't lie together

    def _sums_by_segment(self, product: Product, segments: Sequence[Span]) -> bool:
        """Whether a segment is summed alike on any rank; some CPUs do so only if every one is a multiple of 32 inputs."""
        if not self.kernels.SEGMENTS or isinstance(product, Reordered):
            return False
        return isinstance(product, Int4) or all(segment.start % 32 == 0 for segment in segments)

    def _part(self, path: str, rows: Span, columns: Span) -> tuple[Tensor | Int4Weight, Tensor | None]:
        """A linear's slice as it is held, and the order of its inputs if that isn't their own."""
        if self.config.quantization == "none" or (self.schemes and path not in self.schemes):
            return self._weight(path, rows, columns), None
        if path in self.schemes:
            self._no_hidden_bias(path)
            weight, order = read_int4(self.checkpoint, path, self.schemes[path], rows, columns)
            return weight.to(self.device), None if order is None else order.to(self.device)
        return self._quantised(f"{path}.weight", rows, columns), None

    def _weight(self, path: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """A linear's slice in the model's dtype, expanded if it is stored in four bits."""
        scheme = self.schemes.get(path)
        if scheme is None:
            return self._read(f"{path}.weight", rows, columns)
        linear = self._linear(path)
        rows, columns = rows or Span(0, linear.out_features), columns or Span(0, linear.in_features)
        return expand(*read_int4(self.checkpoint, path, scheme, rows, columns), columns.width).to(self.device, self.dtype)

    def _quantised(self, name: str, rows: Span, columns: Span) -> Int4Weight:
        # Rounded from the file's own values, not from a narrower dtype.
        weight = self.checkpoint.read(name, rows, columns).to(self.device)
        try:
            four: Int4Weight = self.kernels.quantize_int4(weight, self.config.group_size, self.config.symmetric)
            return four
        except ValueError as error:
            raise ModelError(
                f"{name} cannot be quantised: {error}; use another model.group_size, or quantization: none"
            ) from error

    def _bias(self, paths: Sequence[str], spans: Sequence[Span | None]) -> Tensor | None:
        """The biases of linears that are computed together, zero for those without; None if none has one."""
        linears = [self.module.get_submodule(path) for path in paths]
        if all(linear.bias is None for linear in linears):
            return None
        return torch.cat([
            torch.zeros(span.width if span else linear.out_features, dtype=self.dtype, device=self.device)
            if linear.bias is None else self._read(f"{path}.bias", span)
            for path, span, linear in zip(paths, spans, linears, strict=True)
        ])  # fmt: skip

    def _no_hidden_bias(self, path: str) -> None:
        """Old GPTQ files give every linear a bias, of zeros where the model has none."""
        name = f"{path}.bias"
        if self._linear(path).bias is None and name in self.checkpoint.shapes and bool(self.checkpoint.read(name).any()):
            raise ModelError(f"{name} isn't zero, and the architecture has no such bias; the two don't belong together")

    def _linear(self, path: str) -> nn.Linear:
        linear = self.module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return linear

    def _read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        # A copy: what safetensors returns may be the mapped file itself, unaligned and at the mercy of its owner.
        return self.checkpoint.read(name, rows, columns).to(self.device, self.dtype, copy=True)

    def _rest(self, spans: dict[str, Span]) -> int:
        """Norms and whatever else is neither linear nor embedding, and the computed buffers."""
        held = 0
        for path, module in self.module.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta or f"{prefix}{name}" in self.checkpoint.shapes:
                    value = self._read(f"{prefix}{name}", spans.get(f"{prefix}{name}"))
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
                    held += getattr(module, name).nbytes
            for name, buffer in list(module.named_buffers(recurse=False)):
                stored = name not in module._non_persistent_buffers_set
                value = self.checkpoint.read(f"{prefix}{name}").to(buffer.dtype) if stored else buffer
                setattr(module, name, value.to(self.device))
        return held


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
