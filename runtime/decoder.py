"""Where a model's layers are the common ones: finds them, puts ours in their place, and runs them without transformers.

Nothing is taken on trust. A fused layer must give what transformers' own gives for random input, and the loop around
the layers - embedding, positions, final norm, head - is watched once: every value must reach the next part untouched.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.attention import Pass
from runtime.batch import Batch, Piece
from runtime.checkpoint import ModelError
from runtime.comm import PeerLost
from runtime.experts import choosing
from runtime.kernels.packed import PackedInt8
from runtime.kv_cache import CacheShape, KVCache
from runtime.layer import FusedLayer, Gated, Norm, Parts, Scoring, learn_activation, learn_norm, match, random_like
from runtime.linear import ColumnParallel, Dense, Int8
from runtime.rope import Angles
from runtime.skeleton import replace

log = logging.getLogger(__name__)

TOKENS = 12  # of a trial
BLOCK = 8
# How far a fused layer may be from transformers' own: root mean square of the difference over that of what the layer
# adds. Activations that are rounded to 8 bit turn a difference in the last bit into one of a whole step, here and there.
# Whoever computes something else is off by a hundred times as much.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
INT8_STEP = 1e-2


@dataclass(frozen=True)
class Decoder:
    """A whole model of fused layers."""

    embedding: nn.Module
    angles: Angles
    layers: list[FusedLayer]
    norm: Norm
    head: nn.Module
    kernels: ModuleType

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits [L, this rank's vocabulary], in the model's dtype."""
        logits: Tensor = self.head(self.hidden(batch, cache))
        return logits

    @property
    def weight(self) -> Tensor | PackedInt8 | None:
        """The head's weight, where its product by itself makes the logits."""
        if not isinstance(self.head, ColumnParallel) or self.head.gathered or self.head.siblings.bias is not None:
            return None
        product = self.head.siblings.product
        return product.weight if isinstance(product, Dense) else product.packed if isinstance(product, Int8) else None

    @cached_property
    def stack(self) -> Any:
        """All layers as C++ goes through them by itself, or None where it can't."""
        native = [layer.native for layer in self.layers if layer.sums is not None and layer.sums.through is not None]
        if len(native) < len(self.layers) or not all(native):
            return None
        return self.kernels.stack(native, (self.norm.weight, self.norm.eps, self.norm.early))

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        """What the head multiplies, [L, W]: the rows that want logits, normed."""
        x = self.embedding(batch.tokens)
        cos, sin = self.angles(x, batch.positions, batch.tables.shape[1] * cache.block_size)
        if self.stack is not None and x.is_contiguous():
            at = self.kernels.places(cos, sin, batch.slots, batch.tables, batch.rows, batch.reach)
            through = self.layers[0].sums.through  # type: ignore[union-attr]
            last: Tensor = self.kernels.run_layers(self.stack, x, cache.keys, cache.values, at, batch.logits_at, through)
            return last
        update: Tensor | None = None
        for layer in self.layers:
            x, update = layer.step(x, update, cos, sin, batch, cache)
        assert update is not None
        if len(batch.logits_at) < len(x):
            x, update = x[batch.logits_at], update[batch.logits_at]
        normed, _ = self.norm(self.kernels, x, update)
        return normed


@torch.inference_mode()
def fuse(trial: Trial) -> Decoder | None:
    """Replaces the layers of a loaded model that can be, in place; a `Decoder` if the rest is as usual too.

    Every rank of a group must call it, as trial runs exchange sums. A layer that has the structure and yet another result
    stays transformers', with one warning for the model.
    """
    if trial.rotary is None:
        return None
    matched = 0
    for path, layer in list(trial.model.named_modules()):
        found = match(layer, trial.shape.head_dim)
        if found is not None:
            matched += 1
            fused = trial.fused(path, layer, *found)
            if fused is not None:
                replace(trial.model, path, fused)
    return trial.decoder() if matched else None


class Watch:
    """A kernel module to one attention call, which it notes."""

    def __init__(self, kernels: ModuleType) -> None:
        self.write_cache = kernels.write_cache
        self._attention = kernels.paged_attention
        self.seen: list[Scoring] = []

    def paged_attention(self, *arguments: Any) -> Tensor:
        self.seen.append(Scoring(*arguments[6:]))
        out: Tensor = self._attention(*arguments)
        return out


class Trial:
    """A small batch of random tokens, and what it takes to run a model's parts on it. rounds: products round their input
    to 8 bit."""

    def __init__(
        self, model: PreTrainedModel, kernels: ModuleType, shape: CacheShape, dtype: torch.dtype, rounds: bool
    ) -> None:
        self.model, self.kernels, self.shape = model, kernels, shape
        self.under_way = Pass(model)
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        table: Tensor = self.embedding.weight  # type: ignore[assignment]
        self.like = torch.empty(0, dtype=dtype, device=table.device)
        # Tokens of everybody's slice would do as well: a rank's embedding gives zero for the others'.
        pieces = [Piece([(7 * t) % 16 for t in range(TOKENS)], 0, [2, 0], 3)]
        self.batch = Batch.build(pieces, BLOCK, self.like.device)
        self.cache = KVCache(shape, 3, BLOCK, dtype, self.like.device)
        self.tolerance = TOLERANCE[dtype] + (INT8_STEP if rounds else 0.0)
        turning = [x for x in model.base_model.children() if hasattr(x, "inv_freq")]
        self.rotary = turning[0] if len(turning) == 1 else None
        self._warned = False

    def fused(self, path: str, layer: nn.Module, parts: Parts, index: int) -> FusedLayer | None:
        """Ours for a layer, if all its parts are known and it agrees."""
        width, dim = parts.qkv.product.in_features, self.shape.head_dim
        own = [(parts.norm, width), (parts.second_norm, width)]
        own += [(norm, dim) for norm in (parts.query_norm, parts.key_norm) if norm is not None]
        learnt = [learn_norm(module, size, self.like, self.kernels) for module, size in own]
        norms = [norm for norm in learnt if norm is not None]
        activation: str | None = ""
        if isinstance(parts.last, Gated):
            activation = learn_activation(parts.last.activation, self.like, self.kernels)
        if len(norms) < len(own) or activation is None:
            return None
        if len({(norm.eps, norm.early) for norm in norms[2:]}) > 1:
            return None
        x = random_like(self.like, (TOKENS, width))
        watch = Watch(self.kernels)
        try:
            first = self._run(layer, x, watch)
            # Input of the size of what the layer adds, so that roundings of the sum don't cover that.
            x = x * float((first - x).float().square().mean().sqrt().clamp(0.01, 1.0))
            choices: list[tuple[Tensor, ...]] = []  # of experts, which must not differ for the last bit of a row
            with choosing(layer, choices):
                wanted = self._run(layer, x, watch)
            pair = (norms[2], norms[3]) if norms[2:] else None
            (scoring, _) = watch.seen
            fused = FusedLayer(
                layer, parts, (norms[0], norms[1]), pair, activation, scoring, index, dim, self.kernels, self.under_way
            )
            with choosing(fused, choices, again=True):
                found = self._run(fused, x, watch)
        except (ModelError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return None  # it isn't called as the common layer is
        error = (found - wanted).double().square().mean().sqrt()
        if bool(error <= self.tolerance * (wanted - x).double().square().mean().sqrt()):
            return fused
        if not self._warned:
            log.warning(
                "%s looks like a common decoder layer and computes something else; it, and any other like it, runs as "
                "transformers has it, which is slower", path,
            )  # fmt: skip
            self._warned = True
        return None

    def _run(self, layer: nn.Module, x: Tensor, kernels: Any) -> Tensor:
        assert self.rotary is not None
        self.under_way.begin(self.batch, self.cache, kernels)
        out = layer(
            x[None], attention_mask=None, position_ids=self.batch.positions[None], use_cache=False,
            position_embeddings=self.rotary(x[None], self.batch.positions[None]),
        )  # fmt: skip
        if not isinstance(out, Tensor):
            raise TypeError("a layer gives its hidden states and nothing else")
        return out[0]

    @torch.inference_mode()
    def run(self) -> None:
        """Runs the whole model as transformers has it. Raises ModelError if that needs what we don't have."""
        try:
            self.under_way.run(self.model, self.batch, self.cache, self.kernels)
        except PeerLost:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise ModelError(f"{self.model.config.model_type} cannot run here: {error}") from error

    def decoder(self) -> Decoder | None:
        """The model's loop, if all layers are fused and nothing happens between its parts."""
        body = self.model.base_model
        lists = [child for child in body.children() if isinstance(child, nn.ModuleList)]
        norms = [x for x in body.children() if x is not self.embedding and x is not self.rotary and x not in lists]
        if len(lists) != 1 or len(norms) != 1 or not all(isinstance(x, FusedLayer) for x in lists[0]):
            return None
        layers: list[FusedLayer] = list(lists[0])  # type: ignore[arg-type]
        if [layer.index for layer in layers] != list(range(self.shape.layers)):
            return None
        norm = learn_norm(norms[0], layers[0].output.product.out_features, self.like, self.kernels)
        if norm is None or not self._untouched(layers, norms[0]):
            return None
        assert self.rotary is not None
        return Decoder(self.embedding, Angles(self.rotary), layers, norm, self.head, self.kernels)

    def _untouched(self, layers: list[FusedLayer], norm: nn.Module) -> bool:
        """Whether each part is given what the one before it gave, and the head's output is what the model returns."""
        given: dict[nn.Module, tuple[Tensor, Any]] = {}
        gave: dict[nn.Module, Any] = {}
        # Large, so that a soft cap shows.
        logits = 1000.0 * random_like(self.like, (1, len(self.batch.logits_at), self.head.siblings.widths[0]))

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))
            given[module] = first, kwargs.get("position_embeddings")

        def after(module: nn.Module, _: Any, output: Any) -> Any:
            gave[module] = logits if module is self.head else output
            return gave[module]

        assert self.rotary is not None
        chain = [self.embedding, *layers, norm, self.head]
        hooks = [x.register_forward_pre_hook(before, with_kwargs=True) for x in chain]
        hooks += [x.register_forward_hook(after) for x in (*chain, self.rotary)]
        try:
            out = self.under_way.run(self.model, self.batch, self.cache, self.kernels)
        finally:
            for hook in hooks:
                hook.remove()
        if any(x not in given for x in chain) or self.rotary not in gave:
            return False
        handed = all(
            torch.equal(given[after][0], gave[before][:, self.batch.logits_at] if after is self.head else gave[before])
            for before, after in pairwise(chain)
        )
        turned = all(
            torch.equal(mine, theirs)
            for layer in layers
            for mine, theirs in zip(given[layer][1], gave[self.rotary], strict=True)
        )
        return handed and turned and torch.equal(out, logits[0])
