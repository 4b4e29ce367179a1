"""Which rank holds which part of a model: transformers' tensor-parallel plan in numbers.

Nothing here knows an architecture's name. A plan says of each linear layer how it is split; the layers of one module
that belong together (q, k, v and o; gate, up and down) are split so that they agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from runtime.attention import Spread, attends
from runtime.checkpoint import ModelError
from runtime.experts import PACKED, experts_of, routers_of
from runtime.kv_cache import CacheShape
from runtime.shard import HeadShare, Span, head_shares, output_spans, segments, spans, vocabulary_spans
from runtime.skeleton import path_of

WHOLE = {"replicated_with_grad_allreduce", "replicated", "mla_kv_a_proj", "local_params"}
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
    """A linear whose inputs are split and whose outputs are summed; or a layer's experts, of which the same holds.

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
    """One rank's part of a model.

    experts: modules of experts, whose linears stand among the columns. whole: linears that every rank holds in full, in the
    model's dtype. parameters: the rows of bare parameters that are split. spreads: of attention modules, if on some rank of
    the group more queries read one KV head than another.
    """

    columns: list[Columns]
    rows: list[Rows]
    experts: list[Rows]
    whole: list[str]
    parameters: dict[str, Span]
    spreads: dict[str, Spread]
    embedding: str
    embedding_span: Span
    head: str
    head_span: Span
    cache_shape: CacheShape


def lay_out(model: PreTrainedModel, group_size: int, rank: int, size: int) -> Layout:
    """Splits a model; `group_size` is of the quantisation, 1 without. Raises CannotShard, ModelError."""
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{config.model_type} has no plain embedding and output head; it cannot run here")

    whole: list[str] = []
    planned: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # parent, kind -> paths
    experts = dict(experts_of(model))
    apart = tuple(f"{path}." for path in (*experts, *dict(routers_of(model))))
    for path, module in model.named_modules():
        if f"{path}.".startswith(apart):
            continue
        kind = _kind(model, path)
        if module is head or module is embedding or (kind is None and type(module) is not nn.Linear):
            continue
        if kind in KINDS and type(module) is nn.Linear:
            planned[path.rpartition(".")[0]][kind].append(path)
        elif kind is None or kind in WHOLE:
            if isinstance(module, nn.Linear):
                whole.append(path)
        else:
            raise ModelError(f"{config.model_type} splits {path} ({type(module).__name__}) as {kind!r}, unknown here")

    columns: list[Columns] = []
    rows: list[Rows] = []
    shared = [_share(path, module.count, rank, size) for path, module in experts.items()]
    for share in shared:
        columns.extend(_of_experts(model, share))
    heads = _Heads(model, group_size, rank, size)
    for parent, kinds in planned.items():
        if bool(kinds["colwise"]) != bool(kinds["rowwise"]):
            raise ModelError(f"{parent}: a split of its outputs and the sum that undoes it must stand in one module")
        if kinds["colwise"]:
            attention = attends(model.get_submodule(parent))
            shares, mine, parts = (heads if attention else _Inner(model, group_size, rank, size)).split(parent, kinds)
            alike: dict[int, list[str]] = defaultdict(list)  # inputs -> paths
            for path in kinds["colwise"]:
                alike[_linear(model, path).in_features].append(path)
            columns.extend(Columns(tuple(paths), tuple(shares[path] for path in paths)) for paths in alike.values())
            rows.extend(Rows(path, mine, parts) for path in kinds["rowwise"])
        for path in kinds["colwise_gather_output"]:
            every = tuple(output_spans(_linear(model, path).out_features, size, f"outputs of {path}"))
            columns.append(Columns((path,), (every[rank],), every))
        for path in kinds["rowwise_split_input"]:
            inputs = _linear(model, path).in_features
            mine = spans(inputs, group_size, size, f"inputs of {path}")[rank]
            rows.append(Rows(path, mine, segments(partial(spans, inputs, group_size)), whole_input=True))

    return Layout(
        columns=columns,
        rows=rows,
        experts=shared,
        whole=whole,
        parameters=_split_parameters(model, heads),
        spreads=heads.spreads,
        embedding=path_of(model, embedding),
        embedding_span=vocabulary_spans(embedding.num_embeddings, size)[rank],
        head=path_of(model, head),
        head_span=vocabulary_spans(head.out_features, size)[rank],
        cache_shape=CacheShape(config.num_hidden_layers, heads.kept, head_dim(config)),
    )


def head_dim(config: PretrainedConfig) -> int:
    """The width of a cached key or value: the wider one, where they differ."""
    widths = [getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0), getattr(config, "v_head_dim", 0)]
    plain: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return max(*widths, plain)


class _Inner:
    """Splits a block whose inner width is its own affair, such as gate, up and down."""

    def __init__(self, model: PreTrainedModel, group_size: int, rank: int, size: int) -> None:
        self._model, self._group_size, self._rank, self._size = model, group_size, rank, size

    def split(self, parent: str, kinds: dict[str, list[str]]) -> tuple[dict[str, Span], Span, tuple[Span, ...]]:
        """Of each projection the outputs, and of the next the inputs, that this rank holds; and the latter's segments."""
        inputs = _inputs(self._model, parent, kinds)
        mine = spans(inputs, self._group_size, self._size, f"inputs of {kinds['rowwise'][0]}")[self._rank]
        if self._size > 1 and any(_linear(self._model, path).out_features != inputs for path in kinds["colwise"]):
            raise ModelError(f"{parent}: its projections don't have as many outputs as the next has inputs")
        shares = {path: mine.scaled(_linear(self._model, path).out_features, inputs) for path in kinds["colwise"]}
        return shares, mine, segments(partial(spans, inputs, self._group_size))


class _Heads:
    """Splits attention blocks by their heads. shares, spreads: of those split so far; kept: this rank's KV heads."""

    def __init__(self, model: PreTrainedModel, group_size: int, rank: int, size: int) -> None:
        config = model.config.get_text_config()
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        if self.heads % self.kv_heads:
            raise ModelError(f"{config.model_type}: {self.heads} heads don't share {self.kv_heads} KV heads evenly")
        self.shares: dict[str, HeadShare] = {}
        self.spreads: dict[str, Spread] = {}
        self.kept = self.kv_heads
        self._widths = {head_dim(config), getattr(config, "head_dim", None), getattr(config, "v_head_dim", None)} - {None}
        self._model, self._group_size, self._rank, self._size = model, group_size, rank, size

    def split(self, parent: str, kinds: dict[str, list[str]]) -> tuple[dict[str, Span], Span, tuple[Span, ...]]:
        """Of each projection the outputs, and of the next the inputs, that this rank holds; and the latter's segments."""
        inputs, attention = _inputs(self._model, parent, kinds), self._model.get_submodule(parent)
        share = self.heads // self.kv_heads
        if getattr(attention, "num_key_value_groups", share) != share:
            raise ModelError(f"{self._model.config.model_type} has layers of different shapes; only equal ones run here")
        if inputs % self.heads:
            raise ModelError(f"{parent}: {inputs} outputs don't divide into {self.heads} heads")
        together = self.heads // getattr(attention, "mp_num", self.heads)
        share_out = partial(
            head_shares, self.heads, self.kv_heads, inputs // self.heads, self._group_size, together=together
        )
        every = share_out(self._size)
        mine = self.shares[parent] = every[self._rank]
        if not all(part.even(share) for part in every):
            self.spreads[parent] = Spread.of(mine, share)
        self.kept = mine.keys.width
        parts = segments(lambda size: [part.queries.scaled(inputs, self.heads) for part in share_out(size)])
        shares = {path: self._outputs(path, mine) for path in kinds["colwise"]}
        return shares, mine.queries.scaled(inputs, self.heads), parts

    def _outputs(self, path: str, mine: HeadShare) -> Span:
        outputs = _linear(self._model, path).out_features
        if outputs // self.kv_heads in self._widths and outputs % self.kv_heads == 0:
            return mine.keys.scaled(outputs, self.kv_heads)
        if outputs % self.heads:
            raise ModelError(f"{path} has {outputs} outputs, which don't divide into {self.heads} heads")
        return mine.queries.scaled(outputs, self.heads)


def _share(path: str, count: int, rank: int, size: int) -> Rows:
    """A rank's experts of a layer."""
    what = f"experts of {path}"
    return Rows(path, spans(count, 1, size, what)[rank], segments(partial(spans, count, 1)))


def _of_experts(model: PreTrainedModel, share: Rows) -> Iterator[Columns]:
    """The linears of a rank's experts, whole; those with one input together."""
    for index in range(*share.span):
        path = f"{share.path}.{index}"
        for names in PACKED.values():
            paths = tuple(f"{path}.{name}" for name in names)
            yield Columns(paths, tuple(Span(0, _linear(model, path).out_features) for path in paths))


def _inputs(model: PreTrainedModel, parent: str, kinds: dict[str, list[str]]) -> int:
    inputs = {_linear(model, path).in_features for path in kinds["rowwise"]}
    if len(inputs) > 1:
        raise ModelError(f"{parent}: its split projections don't read the same input")
    return inputs.pop()


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


def _split_parameters(model: PreTrainedModel, heads: _Heads) -> dict[str, Span]:
    """The rows of bare parameters that plans split: one for each head, such as attention sinks."""
    found = {}
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for path, parameter in model.named_parameters():
        parent = path.rpartition(".")[0]
        if parent in linears or (kind := _kind(model, path)) not in KINDS:
            continue
        if kind != "colwise" or parent not in heads.shares or parameter.shape != (heads.heads,):
            raise ModelError(f"{model.config.model_type} splits the parameter {path} as {kind!r}, unknown here")
        found[path] = heads.shares[parent].queries
    return found
