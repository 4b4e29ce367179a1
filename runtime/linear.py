"""Linear layers and the embedding as one rank holds them.

A *product* is a weight and how x is multiplied with it: `Dense`, `Int4` or `Int8`, and what is made of those. `ColumnParallel`
and `RowParallel` are the modules that stand in for `nn.Linear`. A row's result has the same bits whatever rows stand
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.comm import Communicator
from runtime.kernels import select
from runtime.kernels.packed import PackedInt4, PackedInt8
from runtime.kernels.reference import ALIGNMENT
from runtime.shard import Span


class Product(Protocol):
    """A weight [out_features, in_features] of one rank."""

    in_features: int
    out_features: int
    nbytes: int

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[M, in_features] -> [M, out_features], of `dtype` or else x's; M may be 0."""


class Dense:
    """A weight [N, K] in the model's dtype, its inputs in segments between `borders`. kernels: those of its device, if not
    given."""

    def __init__(self, weight: Tensor, kernels: ModuleType | None = None, borders: Sequence[int] = ()) -> None:
        aligned = weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0
        self.weight = weight if aligned else torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(weight)
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes
        self._product = (kernels or select(weight.device)).dense_linear
        self.borders = borders

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out: Tensor = self._product(x, self.weight, self.borders, dtype)
        return out


def is_table(product: Product, table: Tensor) -> bool:
    """Whether a head's weight is the embedding's table itself, so that the two are held once."""
    return isinstance(product, Dense) and product.weight.data_ptr() == table.data_ptr()


class Int4:
    """A weight that `kernels.pack_int4` has packed, its inputs in segments between `borders`."""

    def __init__(self, packed: PackedInt4, kernels: ModuleType, borders: Sequence[int] = ()) -> None:
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.nbytes = packed.nbytes
        self._product = kernels.int4_linear
        self.borders = borders

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None, gate: str | None = None) -> Tensor:
        """gate: outputs are gates and ups, of which it makes half as many."""
        if not len(x):
            return x.new_empty(0, self.out_features // 2 if gate else self.out_features, dtype=dtype)
        out: Tensor = self._product(x, self.packed, gate, self.borders, dtype)
        return out


class Int8:
    """A weight that `kernels.pack_int8` has packed."""

    def __init__(self, packed: PackedInt8, kernels: ModuleType) -> None:
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.nbytes = packed.nbytes
        self._product = kernels.int8_linear

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out: Tensor = self._product(x, self.packed)
        return out if dtype is None else out.to(dtype)


class Reordered:
    """A product whose weight has its inputs in another order, some of them maybe twice; order: int64, their places."""

    def __init__(self, product: Product, order: Tensor, in_features: int) -> None:
        self.product, self.order, self.in_features = product, order, in_features
        self.out_features = product.out_features
        self.nbytes = product.nbytes + order.nbytes

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.product(x[:, self.order], dtype)


class Stacked:
    """Products of the same input, one under the other, that cannot be one product."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = list(products)
        self.in_features = products[0].in_features
        self.out_features = sum(product.out_features for product in products)
        self.nbytes = sum(product.nbytes for product in products)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([product(x, dtype) for product in self.products], dim=1)


class Siblings:
    """Products of the same input in one: a module's q, k and v, or gate and up.

    The model calls them one after the other with the same tensor. The first call computes them all, the others take
    their columns; an input that is another tensor than the last is computed anew. Nothing is kept once all were served.
    """

    def __init__(self, product: Product, widths: Sequence[int], bias: Tensor | None = None) -> None:
        if sum(widths) != product.out_features:
            raise ValueError(f"widths {list(widths)} don't add up to {product.out_features} outputs")
        self.product = product
        self.bias = bias
        self.widths = tuple(widths)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, index: int) -> Tensor:
        """[..., K] -> [..., width of sibling `index`]."""
        if self._input is not x or index not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self.together(x).split(self.widths, dim=-1)))
        out = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return out

    def gated(self, x: Tensor, activation: str, kernels: ModuleType) -> Tensor:
        """`kernels.gated` of gate and up, [M, K] -> [M, width of one]; at the end of their product where that is int4."""
        if isinstance(self.product, Int4) and self.bias is None:
            return self.product(x, gate=activation)
        out: Tensor = kernels.gated(self.together(x), activation)
        return out

    @property
    def nbytes(self) -> int:
        return self.product.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def together(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., sum of widths]: all siblings side by side."""
        out = self.product(x.reshape(-1, self.product.in_features))
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.product.out_features)


class ColumnParallel(nn.Module):
    """[..., K] -> [..., this rank's outputs]; with `gathered`, the outputs' spans of all ranks, [..., N]."""

    def __init__(
        self, siblings: Siblings, index: int = 0, comm: Communicator | None = None, gathered: Sequence[Span] = ()
    ) -> None:
        super().__init__()
        self.siblings = siblings
        self.index = index
        self._comm = comm
        self.gathered = list(gathered) if comm is not None and comm.size > 1 else []

    def forward(self, x: Tensor) -> Tensor:
        out = self.siblings(x, self.index)
        if not self.gathered:
            return out
        assert self._comm is not None
        widest = max(span.width for span in self.gathered)
        parts = self._comm.all_gather(functional.pad(out, (0, widest - out.shape[-1])))
        return torch.cat([part[..., : s.width] for part, s in zip(parts, self.gathered, strict=True)], dim=-1)


class RowParallel(nn.Module):
    """[..., this rank's inputs] -> [..., N], summed over the ranks; the bias is added once, to the sum.

    Partial sums are exchanged in float32, so that the sum of all segments is rounded once however many ranks there are.
    With `taken`, the input is whole, [..., K], and this rank takes that span of it.
    """

    def __init__(self, product: Product, bias: Tensor | None, comm: Communicator, taken: Span | None = None) -> None:
        super().__init__()
        self.product = product
        self.bias = bias
        self.comm = comm
        self.taken = taken

    def forward(self, x: Tensor) -> Tensor:
        if self.taken is not None:
            x = x[..., self.taken.start : self.taken.stop]
        part = self.product(x.reshape(-1, self.product.in_features), self.partial)
        return self.finish(part.view(*x.shape[:-1], -1), x.dtype)

    @property
    def partial(self) -> torch.dtype | None:
        """The dtype of a rank's part, if it isn't that of the sum."""
        return None if self.comm.size == 1 else torch.float32

    def finish(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """What all ranks' parts [..., N] come to."""
        out = part if self.comm.size == 1 else self.comm.all_reduce(part, dtype)
        return out if self.bias is None else out + self.bias


class VocabEmbedding(nn.Module):
    """Looks up the ids of this rank's span, gives zero for the others, and sums over the ranks.

    inner: the architecture's own embedding, holding this rank's rows: some scale what they look up.
    """

    def __init__(self, inner: nn.Embedding, span: Span, comm: Communicator) -> None:
        super().__init__()
        inner.padding_idx = None  # it only matters to gradients and counts from the whole vocabulary's start
        self.inner = inner
        self._span = span
        self._comm = comm

    @property
    def weight(self) -> Tensor:
        """[this rank's ids, width]."""
        return self.inner.weight

    def forward(self, ids: Tensor) -> Tensor:
        if self._comm.size == 1:
            out: Tensor = self.inner(ids)
            return out
        local = ids - self._span.start
        mine = (local >= 0) & (local < self._span.width)
        out = self.inner(local.where(mine, 0))
        return self._comm.all_reduce(out.where(mine[..., None], 0))
