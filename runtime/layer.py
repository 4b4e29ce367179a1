"""A decoder layer in nine operations instead of some fifty.

Norm, q/k/v with or without norms of their own, rotary positions, attention, o, residual, norm, gate and up, activation,
down, residual: nearly all dense decoders share this layer. A mixture of experts may stand where gate, up and down do, and is
then called as it is. A layer is recognised by its modules and their shapes, and what
they don't say - a scale, a window, where a norm rounds - is learnt by running transformers' own layer once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from runtime.attention import Pass, attends
from runtime.batch import Batch
from runtime.comm import Communicator
from runtime.experts import Experts
from runtime.kernels.arguments import GATES
from runtime.kv_cache import KVCache
from runtime.linear import ColumnParallel, Dense, Int4, RowParallel, Siblings


@dataclass(frozen=True)
class Norm:
    """What `kernels.rms_norm` needs: weight float32 [W], eps, and whether it rounds before the weight too."""

    weight: Tensor
    eps: float
    early: bool

    def __call__(self, kernels: ModuleType, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[M, W] -> (normed, x + residual)."""
        normed, total = kernels.rms_norm(x, self.weight, self.eps, self.early, residual)
        return normed, total


@dataclass(frozen=True)
class Scoring:
    """How a layer's attention is called: the last arguments of `kernels.paged_attention`."""

    scale: float
    window: int
    soft_cap: float
    sinks: Tensor | None


@dataclass(frozen=True)
class Gated:
    """The modules of a gated block."""

    gate_up: Siblings
    activation: nn.Module
    down: RowParallel


@dataclass(frozen=True)
class Parts:
    """The modules of a layer that has the structure, in the order in which they work. last: or a mixture of experts."""

    norm: nn.Module
    qkv: Siblings
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    output: RowParallel
    second_norm: nn.Module
    last: Gated | nn.Module


class FusedLayer(nn.Module):
    """Stands in for a layer of transformers, called by its loop or, with less ado, by `runtime.decoder`.

    index: its place in the cache. dim: of a head. activation: as `kernels.gated` knows it, "" where there is a mixture. native:
    the layer in C++, if it is one that C++ knows. What else of a layer its loop may look at is taken over from `inner`.
    """

    def __init__(
        self, inner: nn.Module, parts: Parts, norms: tuple[Norm, Norm], head_norms: tuple[Norm, Norm] | None,
        activation: str, scoring: Scoring, index: int, dim: int, kernels: ModuleType, under_way: Pass,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in vars(inner).items():
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)
        self.index = index
        self._dim = dim
        self._norms = norms
        self._head_norms = head_norms
        self._qkv, self.output = parts.qkv, parts.output
        self._gated = parts.last if isinstance(parts.last, Gated) else None
        self.last: nn.Module = parts.last.down if isinstance(parts.last, Gated) else parts.last
        self._activation = activation
        self._scoring = scoring
        self._kernels = kernels
        self._under_way = under_way
        self.native = self._native(parts)

    def _native(self, parts: Parts) -> Any:
        """The layer as `kernels.NativeLayer`, where the kernels have such and know all of its products."""
        make, gated = getattr(self._kernels, "NativeLayer", None), self._gated
        if make is None or gated is None:
            return None
        weights = [
            (parts.qkv.product, parts.qkv.bias), (parts.output.product, None), (gated.gate_up.product, gated.gate_up.bias),
            (gated.down.product, None),
        ]  # fmt: skip
        known = Int4 | Dense if self._kernels.SEGMENTS else Int4  # loose kernels have other dense products than C++
        products = [
            self._kernels.product(product.packed if isinstance(product, Int4) else product.weight, bias, product.borders)
            for product, bias in weights
            if isinstance(product, known)
        ]
        if len(products) < len(weights):
            return None
        first, second = self._norms
        norms = [
            (None, 0.0, False) if norm is None else (norm.weight, norm.eps, norm.early)
            for norm in (first, *(self._head_norms or (None, None)), second)
        ]
        scoring = self._scoring
        return make(
            norms, products, self._activation, parts.output.partial is not None, self._dim,
            (scoring.scale, scoring.window, scoring.soft_cap, scoring.sinks),
        )  # fmt: skip

    @property
    def sums(self) -> Communicator | None:
        """What adds up what o and down give, if nothing more is done with that; None if something is."""
        rows = [x for x in (self.output, self.last) if isinstance(x, RowParallel) and x.bias is None]
        return self.output.comm if len(rows) == 2 else None

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        """[1, T, W] -> [1, T, W], as transformers' loop calls a layer."""
        cos, sin = position_embeddings
        x, update = self.step(hidden_states[0], None, cos[0], sin[0], self._under_way.batch, self._under_way.cache)
        return (x + update)[None]

    def step(
        self, x: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """x, update [T, W], cos, sin [T, R] -> x, update: the sum of the two is what a layer is given or gives."""
        if self.native is not None and x.is_contiguous():
            at = self._kernels.places(cos, sin, batch.slots, batch.tables, batch.rows, batch.reach)
            part, x = self.native.attention(x, update, cache.keys[self.index], cache.values[self.index], at)
            part, x = self.native.mlp(x, self.output.finish(part, x.dtype))
            return x, self.last.finish(part, x.dtype)  # type: ignore[operator]
        kernels, scoring = self._kernels, self._scoring
        query_norm, key_norm = self._head_norms or (None, None)
        keys, values = cache.keys[self.index], cache.values[self.index]
        normed, x = self._norms[0](kernels, x, update)
        query = kernels.rotary_write(
            self._qkv.together(normed), cos, sin,
            None if query_norm is None else query_norm.weight, None if key_norm is None else key_norm.weight,
            0.0 if query_norm is None else query_norm.eps, query_norm is not None and query_norm.early,
            keys, values, batch.slots,
        )  # fmt: skip
        heads = kernels.paged_attention(
            query, keys, values, batch.tables, batch.rows, batch.reach,
            scoring.scale, scoring.window, scoring.soft_cap, scoring.sinks,
        )  # fmt: skip
        normed, x = self._norms[1](kernels, x, self.output(heads.view(len(x), -1)))
        if self._gated is None:
            return x, self.last(normed[None])[0]
        return x, self.last(self._gated.gate_up.gated(normed, self._activation, kernels))


def match(layer: nn.Module, head_dim: int) -> tuple[Parts, int] | None:
    """The parts of a layer and its place in the cache, if its modules are those of the structure."""
    attentions = [child for child in layer.children() if attends(child)]
    blocks = [child for child in layer.children() if any(isinstance(x, RowParallel | Experts) for x in child.children())]
    norms = [child for child in layer.children() if child not in blocks]
    if len(attentions) != 1 or len(blocks) != 2 or attentions[0] not in blocks or len(norms) != 2:
        return None
    (attention,) = attentions
    if any(hasattr(attention, name) for name in ("spread", "chunk", "tuning")):
        return None  # its heads are uneven on some rank of the group, or `attend` does more for it
    (mlp,) = (block for block in blocks if block is not attention)
    found, last = _projections(attention, 3), _last(mlp)
    if found is None or last is None:
        return None
    qkv, output, head_norms = found
    query, key, value = qkv.widths
    if key != value or query % key or key % head_dim or output.product.in_features != query:
        return None
    if len(head_norms) not in (0, 2):
        return None
    query_norm, key_norm = head_norms or (None, None)
    index: int = attention.layer_idx  # type: ignore[assignment]
    return Parts(norms[0], qkv, query_norm, key_norm, output, norms[1], last), index


def _last(block: nn.Module) -> Gated | nn.Module | None:
    """A layer's second block, if it is a gated one or a mixture of experts."""
    if any(isinstance(child, Experts) for child in block.children()):
        return block
    found = _projections(block, 2)
    if found is None or len(found[2]) != 1 or len(set(found[0].widths)) != 1:
        return None
    gate_up, down, (activation,) = found
    return Gated(gate_up, activation, down)


def learn_norm(module: nn.Module, width: int, like: Tensor, kernels: ModuleType) -> Norm | None:
    """The `Norm` that gives what a module gives for [M, width] like `like`, or None if none does."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or (weight is not None and weight.shape != (width,)):
        return None
    own = torch.ones(width, device=like.device) if weight is None else weight.detach().float()
    # Small rows, so that eps matters.
    x = random_like(like, (6, width)) * torch.tensor([[1.0], [1.0], [30.0], [1e-3], [1e-2], [0.1]]).to(like)
    wanted = module(x[None])[0]
    best: tuple[int, Norm] | None = None
    for norm in (Norm(shifted, eps, early) for shifted in (own, own + 1.0) for early in (True, False)):
        found, _ = norm(kernels, x)
        if near(found, wanted, 2.0) and (best is None or int((found != wanted).sum()) < best[0]):
            best = int((found != wanted).sum()), norm
    return None if best is None else best[1]


def learn_activation(module: nn.Module, like: Tensor, kernels: ModuleType) -> str | None:
    """The name that `kernels.gated` has for an activation module, or None."""
    x = 3.0 * random_like(like, (4, 64))
    wanted = module(x)
    names = (name for name in GATES if near(kernels.gated(torch.cat([x, torch.ones_like(x)], 1), name), wanted, 2.0))
    return next(names, None)


def random_like(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Normal noise of a tensor's dtype and device, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def near(found: Tensor, wanted: Tensor, steps: float) -> bool:
    """Whether the two are so many roundings apart, each row by itself and on average."""
    step = torch.finfo(wanted.dtype).eps
    error = (found.double() - wanted.double()).square().mean(-1).sqrt()
    return bool((error <= steps * step * wanted.double().square().mean(-1).sqrt()).all())


def _projections(block: nn.Module, count: int) -> tuple[Siblings, RowParallel, list[nn.Module]] | None:
    """A block's merged input projections, of which there must be `count`, its output projection, and what else it has."""
    columns = sorted((x for x in block.children() if isinstance(x, ColumnParallel)), key=lambda x: x.index)
    rows = [x for x in block.children() if isinstance(x, RowParallel)]
    if len(columns) != count or len(rows) != 1 or rows[0].taken is not None:
        return None
    siblings = columns[0].siblings
    whole = all(x.siblings is siblings and not x.gathered for x in columns)
    if not whole or len(siblings.widths) != count:
        return None
    return siblings, rows[0], [x for x in block.children() if not isinstance(x, ColumnParallel | RowParallel)]
