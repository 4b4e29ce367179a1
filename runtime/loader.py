"""Puts this rank's slices of a checkpoint's weights into a model's skeleton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from runtime.comm import Communicator
from runtime.experts import Experts
from runtime.layout import Columns, Layout, Rows
from runtime.linear import ColumnParallel, Int4, Product, Reordered, RowParallel, Siblings, VocabEmbedding, is_table
from runtime.products import Part, Products
from runtime.read_ahead import Extent, ReadAhead
from runtime.screened import Screened
from runtime.shard import Span
from runtime.skeleton import replace

OnPart = Callable[[int, int], None]  # told how many parts of a model are loaded, of how many
Put = Callable[[dict[str, nn.Module]], int]  # adds modules by path; returns the bytes they hold


@dataclass
class Loader:
    """Puts products into a skeleton, in the order in which their weights lie in the files.

    ranks_alike: whether, of what was put, every sum over ranks has the same bits on 1, 2, 4 and 8 ranks.
    """

    module: PreTrainedModel
    products: Products
    comm: Communicator
    ranks_alike: bool = True

    def fill(self, layout: Layout, tied: dict[str, str], on_part: OnPart) -> int:
        """Replaces and fills all modules. Returns the bytes of weights held."""
        products, swaps, held = self.products, dict[str, nn.Module](), 0
        steps = self._steps(layout, tied)
        with ReadAhead([extents for extents, _ in steps]) as ahead:
            for index, (_, put) in enumerate(steps):
                ahead.begin(index)
                held += put(swaps)
                on_part(index + 1, len(steps))
        for share in layout.experts:
            experts: Experts = self.module.get_submodule(share.path)  # type: ignore[assignment]
            experts.keep(share.span, share.borders if products.kernels.SEGMENTS else (), self.comm)
            self.ranks_alike &= share.complete and products.kernels.SEGMENTS
        for path, swap in swaps.items():
            replace(self.module, path, swap)
        for path, spread in layout.spreads.items():
            self.module.get_submodule(path).spread = spread.to(products.device)  # type: ignore[assignment]
        belt = products.belt
        return held + self._rest(layout.parameters) + (belt.start() if belt is not None else 0)

    def _steps(self, layout: Layout, tied: dict[str, str]) -> list[tuple[list[Extent], Put]]:
        """What each step needs of the files and how it puts its modules, in the order in which the files have them."""
        products = self.products
        ends = [(layout.embedding, layout.embedding_span, Span(0, 0)), (layout.head, layout.head_span, Span(0, 0))]
        steps: list[tuple[list[Part], Put]] = [(ends, partial(self._ends, layout, tied))]
        for columns in layout.columns:
            parts = [(path, span, products.inputs(path)) for path, span in zip(columns.paths, columns.spans, strict=True)]
            steps.append((parts, partial(self._columns, columns, parts)))
        for rows in layout.rows:
            part = rows.path, products.outputs(rows.path), rows.span
            steps.append(([part], partial(self._rows, rows, part)))
        for path in layout.whole:
            part = path, products.outputs(path), products.inputs(path)
            steps.append(([part], partial(self._whole, part)))
        found = [(products.checkpoint.extents([(path, rows) for path, rows, _ in parts]), put) for parts, put in steps]
        return sorted(found, key=lambda step: step[0])

    def _ends(self, layout: Layout, tied: dict[str, str], swaps: dict[str, nn.Module]) -> int:
        """The embedding and the head, whose weight may be the same."""
        products = self.products
        embedding = self.module.get_submodule(layout.embedding)
        assert isinstance(embedding, nn.Embedding)
        table = products.read(f"{layout.embedding}.weight", layout.embedding_span)
        embedding.weight = nn.Parameter(table, requires_grad=False)
        stored = tied.get(f"{layout.head}.weight", f"{layout.head}.weight")
        head = products.head(layout.head, stored, layout.head_span, table if f"{layout.head}.weight" in tied else None)
        bias = products.bias([layout.head], [layout.head_span])
        swaps[layout.embedding] = VocabEmbedding(embedding, layout.embedding_span, self.comm)
        swaps[layout.head] = ColumnParallel(Siblings(head, [layout.head_span.width], bias))
        kept = head.kept if isinstance(head, Screened) else 0
        return table.nbytes + kept + (0 if is_table(head, table) else head.nbytes) + (0 if bias is None else bias.nbytes)

    def _columns(self, columns: Columns, parts: list[Part], swaps: dict[str, nn.Module]) -> int:
        """Linears of one input, whose outputs are split."""
        siblings = Siblings(
            self.products.of(parts), [s.width for s in columns.spans], self.products.bias(columns.paths, columns.spans)
        )
        for index, path in enumerate(columns.paths):
            swaps[path] = ColumnParallel(siblings, index, self.comm, columns.gathered)
        return siblings.nbytes

    def _rows(self, rows: Rows, part: Part, swaps: dict[str, nn.Module]) -> int:
        """A linear whose inputs are split."""
        product = self.products.of([part], rows.borders if self.products.kernels.SEGMENTS else ())
        bias = self.products.bias([rows.path], [None])
        self.ranks_alike &= rows.complete and self._sums_by_segment(product, rows.segments)
        swaps[rows.path] = RowParallel(product, bias, self.comm, rows.span if rows.whole_input else None)
        return product.nbytes + (0 if bias is None else bias.nbytes)

    def _whole(self, part: Part, swaps: dict[str, nn.Module]) -> int:
        """A linear that every rank holds in full."""
        product = self.products.whole(part)
        siblings = Siblings(product, [product.out_features], self.products.bias([part[0]], [None]))
        swaps[part[0]] = ColumnParallel(siblings)
        return siblings.nbytes

    def _sums_by_segment(self, product: Product, segments: Sequence[Span]) -> bool:
        """Whether a segment is summed alike on any rank; some CPUs do so only if every one is a multiple of 32 inputs."""
        if not self.products.kernels.SEGMENTS or isinstance(product, Reordered):
            return False
        return isinstance(product, Int4) or all(segment.start % 32 == 0 for segment in segments)

    def _rest(self, spans: dict[str, Span]) -> int:
        """Norms and whatever else is neither linear nor embedding, and the computed buffers."""
        held = 0
        for path, module in self.module.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta or f"{prefix}{name}" in self.products.checkpoint.shapes:
                    value = self.products.read(f"{prefix}{name}", spans.get(f"{prefix}{name}"))
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
                    held += getattr(module, name).nbytes
            for name, buffer in list(module.named_buffers(recurse=False)):
                stored = name not in module._non_persistent_buffers_set
                value = self.products.checkpoint.read(f"{prefix}{name}").to(buffer.dtype) if stored else buffer
                setattr(module, name, value.to(self.products.device))
        return held
