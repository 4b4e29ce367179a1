"""Which rank holds which part of a model: transformers' tensor-parallel plan in numbers.

Nothing here knows an architecture's name. A plan says of each linear layer how it is split; the layers of one module
that belong together (q, k, v and o; gate, up and down) are split so that they agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from runtime.checkpoint import ModelError
from runtime.kv_cache import CacheShape
from runtime.shard import Span, head_spans, segments, spans, vocabulary_spans
from runtime.skeleton import path_of

WHOLE = {"replicated_with_grad_allreduce", "replicated"}
KINDS = {"colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"}


@dataclass(frozen=True)
class Columns:
    """Linears of one module with the same input, computed as one product. `gathered`: the spans of every rank, if the
    output is put together again."""

    paths: tuple[str, ...]
    spans: tuple[Span, ...]
    gathered: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Rows:
    """A linear whose inputs are split and whose outputs are summed.

    segments: of all inputs, each summed by itself. whole_input: the input has not been split yet.
    """

    path: str
    span: Span
    segments: tuple[Span, ...]
    whole_input: bool = False

    @property
    def borders(self) -> tuple[int, ...]:
        """Where, counted from the span's start, one segment ends and the next begins."""
        return tuple(s.start - self.span.start for s in self.segments if self.span.start < s.start < self.span.stop)

    @property
    def complete(self) -> bool:
        """Whether the span is a whole branch of the binary tree over the segments: 1, 2, 4 or 8 of them from such a place."""
        starts = [s.start for s in self.segments]
        if self.span.start not in starts or self.span.stop not in (*starts[1:], self.segments[-1].stop):
            return False
        count = len(self.borders) + 1
        return len(self.segments) % count == 0 and starts.index(self.span.start) % count == 0


@dataclass(frozen=True)
class Layout:
    """One rank's part of a model. `whole`: linears that every rank holds in full, in the model's dtype."""

    columns: list[Columns]
    rows: list[Rows]
    whole: list[str]
    embedding: str
    embedding_span: Span
    head: str
    head_span: Span
    cache_shape: CacheShape


def lay_out(model: PreTrainedModel, group_size: int, rank: int, size: int) -> Layout:
    """Splits a model; `group_size` is of the quantisation, 1 without. Raises CannotShard, ModelError."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{config.model_type} has no plain embedding and output head; it cannot run here")

    whole: list[str] = []
    planned: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # parent, kind -> paths
    for path, module in model.named_modules():
        kind = _kind(model, path)
        if module is head or module is embedding or (kind is None and not isinstance(module, nn.Linear)):
            continue
        if kind in KINDS and type(module) is nn.Linear:
            planned[path.rpartition(".")[0]][kind].append(path)
        elif kind is None or kind in WHOLE:
            if isinstance(module, nn.Linear):
                whole.append(path)
        else:
            raise ModelError(f"{config.model_type} splits {path} ({type(module).__name__}) as {kind!r}, unknown here")
    _no_split_parameters(model)

    columns: list[Columns] = []
    rows: list[Rows] = []
    sharded_heads = kv_heads
    for parent, kinds in planned.items():
        block = _Block(model, parent, kinds)
        if kinds["colwise"]:
            if hasattr(model.get_submodule(parent), "layer_idx"):
                units = head_spans(kv_heads, block.inputs, group_size, size)
                mine = units[rank].scaled(block.inputs, kv_heads)
                parts = segments(partial(head_spans, kv_heads, block.inputs, group_size))
                parts = tuple(part.scaled(block.inputs, kv_heads) for part in parts)
                sharded_heads = units[rank].width
                shares = tuple(units[rank].scaled(block.outputs(path, kv_heads), kv_heads) for path in kinds["colwise"])
            else:
                mine = spans(block.inputs, group_size, size, f"inputs of {kinds['rowwise'][0]}")[rank]
                parts = segments(partial(spans, block.inputs, group_size))
                shares = tuple(mine.scaled(block.outputs(path, block.inputs), block.inputs) for path in kinds["colwise"])
                if size > 1 and any(share != mine for share in shares):
                    raise ModelError(f"{parent}: its projections don't have as many outputs as the next has inputs")
            columns.append(Columns(tuple(kinds["colwise"]), shares))
            rows.extend(Rows(path, mine, parts) for path in kinds["rowwise"])
        for path in kinds["colwise_gather_output"]:
            every = tuple(spans(_linear(model, path).out_features, 16, size, f"outputs of {path}"))
            columns.append(Columns((path,), (every[rank],), every))
        for path in kinds["rowwise_split_input"]:
            inputs = _linear(model, path).in_features
            mine = spans(inputs, group_size, size, f"inputs of {path}")[rank]
            rows.append(Rows(path, mine, segments(partial(spans, inputs, group_size)), whole_input=True))

    return Layout(
        columns=columns,
        rows=rows,
        whole=whole,
        embedding=path_of(model, embedding),
        embedding_span=vocabulary_spans(embedding.num_embeddings, size)[rank],
        head=path_of(model, head),
        head_span=vocabulary_spans(head.out_features, size)[rank],
        cache_shape=CacheShape(config.num_hidden_layers, sharded_heads, head_dim),
    )


class _Block:
    """A module with split linears, and the checks that they belong together."""

    def __init__(self, model: PreTrainedModel, parent: str, kinds: dict[str, list[str]]) -> None:
        self._model, self._parent = model, parent
        if bool(kinds["colwise"]) != bool(kinds["rowwise"]):
            raise ModelError(f"{parent}: a split of its outputs and the sum that undoes it must stand in one module")
        inputs = {_linear(model, path).in_features for path in kinds["rowwise"]}
        if len(inputs) > 1 or len({_linear(model, path).in_features for path in kinds["colwise"]}) > 1:
            raise ModelError(f"{parent}: its split projections don't read the same input")
        self.inputs = inputs.pop() if inputs else 0

    def outputs(self, path: str, units: int) -> int:
        outputs = _linear(self._model, path).out_features
        if outputs % units:
            raise ModelError(f"{path} has {outputs} outputs, which don't divide into the {units} parts of {self._parent}")
        return outputs


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _kind(model: PreTrainedModel, path: str) -> str | None:
    for pattern, kind in (model._tp_plan or {}).items():
        if _matches(pattern.removesuffix(".weight"), path):
            return kind
    return None


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), path) is not None


def _no_split_parameters(model: PreTrainedModel) -> None:
    """Plans may split bare parameters too, such as attention sinks; those aren't supported yet."""
    modules = {path for path, _ in model.named_modules()}
    for path, _ in model.named_parameters():
        if path not in modules and (kind := _kind(model, path)) in KINDS and path.rpartition(".")[2] not in ("weight", "bias"):
            raise ModelError(f"{model.config.model_type} splits the parameter {path} as {kind!r}, unknown here")
