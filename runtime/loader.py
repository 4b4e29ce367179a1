"""Puts this rank's slices of a checkpoint's weights into a model's skeleton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import ModelConfig
from runtime.checkpoint import Checkpoint, ModelError
from runtime.comm import Communicator
from runtime.layout import Layout
from runtime.linear import ColumnParallel, Dense, Int4, Int8, Product, RowParallel, Siblings, VocabEmbedding
from runtime.quantize.int4 import Int4Weight, quantize
from runtime.quantize.int8 import Int8Weight
from runtime.quantize.int8 import quantize as quantize_int8
from runtime.shard import Span
from runtime.skeleton import replace

HEAD_ROWS = 16384  # of a vocabulary that are rounded at a time


@dataclass
class Loader:
    """Puts the weights of a checkpoint into a skeleton, one source tensor at a time."""

    module: PreTrainedModel
    config: ModelConfig
    checkpoint: Checkpoint
    kernels: ModuleType
    dtype: torch.dtype
    device: torch.device
    comm: Communicator

    def fill(self, layout: Layout, tied: dict[str, str]) -> int:
        """Replaces and fills all modules. Returns the bytes of weights held."""
        held = 0
        comm = self.comm
        embedding = self.module.get_submodule(layout.embedding)
        assert isinstance(embedding, nn.Embedding)
        table = self._read(f"{layout.embedding}.weight", layout.embedding_span)
        embedding.weight = nn.Parameter(table, requires_grad=False)
        stored = tied.get(f"{layout.head}.weight", f"{layout.head}.weight")
        head = self._head(stored, layout.head_span, table if f"{layout.head}.weight" in tied else None)
        head_bias = self._bias([layout.head], [layout.head_span])
        shared = isinstance(head, Dense) and head.weight.data_ptr() == table.data_ptr()
        held += table.nbytes + (0 if shared else head.nbytes) + (0 if head_bias is None else head_bias.nbytes)

        swaps: dict[str, nn.Module] = {
            layout.embedding: VocabEmbedding(embedding, layout.embedding_span, comm),
            layout.head: ColumnParallel(Siblings(head, [layout.head_span.width], head_bias)),
        }
        for columns in layout.columns:
            product = self._product([(path, span, None) for path, span in zip(columns.paths, columns.spans, strict=True)])
            siblings = Siblings(product, [s.width for s in columns.spans], self._bias(columns.paths, columns.spans))
            held += siblings.nbytes
            for index, path in enumerate(columns.paths):
                swaps[path] = ColumnParallel(siblings, index, comm, columns.gathered)
        for rows in layout.rows:
            product, bias = self._product([(rows.path, None, rows.span)]), self._bias([rows.path], [None])
            held += product.nbytes + (0 if bias is None else bias.nbytes)
            swaps[rows.path] = RowParallel(product, bias, comm, rows.span if rows.whole_input else None)
        for path in layout.whole:
            dense = Dense(self._read(f"{path}.weight"), self.kernels)
            siblings = Siblings(dense, [dense.out_features], self._bias([path], [None]))
            held += siblings.nbytes
            swaps[path] = ColumnParallel(siblings)
        for path, swap in swaps.items():
            replace(self.module, path, swap)
        return held + self._rest()

    def _head(self, name: str, span: Span, table: Tensor | None) -> Product:
        """The head's product; `table` is the embedding's weight, if that is the head's too."""
        if self.config.lm_head == "16bit":
            return Dense(self._read(name, span) if table is None else table, self.kernels)
        # From the file's own values, some rows at a time: each has a scale of its own.
        starts = range(span.start, span.stop, HEAD_ROWS)
        pieces = (Span(start, min(start + HEAD_ROWS, span.stop)) for start in starts)
        try:
            parts = [quantize_int8(self.checkpoint.read(name, piece).to(self.device)) for piece in pieces]
        except ValueError as error:
            raise ModelError(f"{name} cannot be quantised: {error}; use model.lm_head: 16bit") from error
        whole = Int8Weight(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))
        return Int8(self.kernels.pack_int8(whole), self.kernels)

    def _product(self, parts: list[tuple[str, Span | None, Span | None]]) -> Product:
        """One product of linears' slices (path, rows, columns), laid one under the other."""
        if self.config.quantization == "none":
            return Dense(torch.cat([self._read(f"{path}.weight", *slices) for path, *slices in parts]), self.kernels)
        weights = [self._quantised(f"{path}.weight", rows, columns) for path, rows, columns in parts]
        merged = Int4Weight(
            torch.cat([weight.codes for weight in weights]),
            torch.cat([weight.scale for weight in weights]),
            torch.cat([weight.zero for weight in weights]),
            self.config.group_size,
        )
        return Int4(self.kernels.pack_int4(merged, self.config.activations), self.kernels)

    def _quantised(self, name: str, rows: Span | None, columns: Span | None) -> Int4Weight:
        # Rounded from the file's own values, not from a narrower dtype.
        weight = self.checkpoint.read(name, rows, columns).to(self.device)
        try:
            return quantize(weight, self.config.group_size, self.config.symmetric)
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

    def _read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        # A copy: what safetensors returns may be the mapped file itself, unaligned and at the mercy of its owner.
        return self.checkpoint.read(name, rows, columns).to(self.device, self.dtype, copy=True)

    def _rest(self) -> int:
        """Norms and whatever else is neither linear nor embedding, and the computed buffers."""
        held = 0
        for path, module in self.module.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta or f"{prefix}{name}" in self.checkpoint.shapes:
                    setattr(module, name, nn.Parameter(self._read(f"{prefix}{name}"), requires_grad=False))
                    held += getattr(module, name).nbytes
            for name, buffer in list(module.named_buffers(recurse=False)):
                stored = name not in module._non_persistent_buffers_set
                value = self.checkpoint.read(f"{prefix}{name}").to(buffer.dtype) if stored else buffer
                setattr(module, name, value.to(self.device))
        return held
