"""Linear layers and the embedding as one rank holds them.

A *product* is a weight and how x is multiplied with it: `Dense` or `Int4`, and what is made of those. `ColumnParallel`
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
from runtime.kernels.packed import PackedInt4
from runtime.shard import Span

# Rows that a dense product computes at a time, always exactly so many. Libraries choose their kernel, and with it the
# order of additions, by the number of rows (bfloat16 and float32 alike); with that number fixed a row's bits depend
# neither on its place nor on the others (`tests/test_linear.py`). A CPU takes little longer for 32 rows of 16 bit than
# for one, a GPU for 64.
CHUNK = {"cpu": 32, "cuda": 64}
ALIGNMENT = 64  # bytes; a library may treat the ends of an unaligned matrix otherwise


class Product(Protocol):
    """A weight [out_features, in_features] of one rank."""

    in_features: int
    out_features: int
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in_features] -> [M, out_features], of x's dtype; M may be 0."""


class Dense:
    """A weight [N, K] in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight if _aligned(weight) else torch.empty_like(weight).copy_(weight)
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes
        self._chunk = CHUNK.get(weight.device.type, 32)

    def __call__(self, x: Tensor) -> Tensor:
        count, chunk = len(x), self._chunk
        if count % chunk or not _aligned(x):
            padded = x.new_zeros(-(-count // chunk) * chunk, self.in_features)
            padded[:count] = x
            x = padded
        if count <= chunk:
            return functional.linear(x, self.weight)[:count]
        return torch.cat([functional.linear(rows, self.weight) for rows in x.split(chunk)])[:count]


class Int4:
    """A weight that `kernels.pack_int4` has packed."""

    def __init__(self, packed: PackedInt4, kernels: ModuleType) -> None:
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.nbytes = packed.nbytes
        self._product = kernels.int4_linear

    def __call__(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.out_features)
        out: Tensor = self._product(x, self.packed)
        return out


class Reordered:
    """A product whose weight has its inputs in another order, some of them maybe twice; order: int64, their places."""

    def __init__(self, product: Product, order: Tensor, in_features: int) -> None:
        self.product, self.order, self.in_features = product, order, in_features
        self.out_features = product.out_features
        self.nbytes = product.nbytes + order.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x[:, self.order])


class Stacked:
    """Products of the same input, one under the other, that cannot be one product."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = list(products)
        self.in_features = products[0].in_features
        self.out_features = sum(product.out_features for product in products)
        self.nbytes = sum(product.nbytes for product in products)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in self.products], dim=1)


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
        self._widths = list(widths)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, index: int) -> Tensor:
        """[..., K] -> [..., width of sibling `index`]."""
        if self._input is not x or index not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self._compute(x).split(self._widths, dim=-1)))
        out = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return out

    @property
    def nbytes(self) -> int:
        return self.product.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def _compute(self, x: Tensor) -> Tensor:
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
        self._index = index
        self._comm = comm
        self._gathered = list(gathered) if comm is not None and comm.size > 1 else []

    def forward(self, x: Tensor) -> Tensor:
        out = self.siblings(x, self._index)
        if not self._gathered:
            return out
        assert self._comm is not None
        widest = max(span.width for span in self._gathered)
        parts = self._comm.all_gather(functional.pad(out, (0, widest - out.shape[-1])))
        return torch.cat([part[..., : s.width] for part, s in zip(parts, self._gathered, strict=True)], dim=-1)


class RowParallel(nn.Module):
    """[..., this rank's inputs] -> [..., N], summed over the ranks; the bias is added once, to the sum.

    With `taken`, the input is whole, [..., K], and this rank takes that span of it.
    """

    def __init__(self, product: Product, bias: Tensor | None, comm: Communicator, taken: Span | None = None) -> None:
        super().__init__()
        self.product = product
        self.bias = bias
        self._comm = comm
        self._taken = taken

    def forward(self, x: Tensor) -> Tensor:
        if self._taken is not None:
            x = x[..., self._taken.start : self._taken.stop]
        out = self.product(x.reshape(-1, self.product.in_features)).view(*x.shape[:-1], -1)
        if self._comm.size > 1:
            out = self._comm.all_reduce(out)
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


def _aligned(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0
