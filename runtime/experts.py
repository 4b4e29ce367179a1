"""Mixtures of experts: each expert a module of plain linears, and the sum of those that a row is sent to.

transformers holds the experts of a layer in two tensors of three dimensions. Here each has gate_proj, up_proj and
down_proj of its own, as checkpoints name them: so that four bits, files in others' formats and the quantiser, which know
linears, know experts too. A rank has whole experts, and which a row is sent to is decided on every rank alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from runtime.checkpoint import Checkpoint, ModelError
from runtime.comm import Communicator, Solo
from runtime.kernels.reference import CHUNK
from runtime.shard import Span

PACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # what lies in one tensor in transformers
SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight\$?")  # how transformers describes one expert's tensor in a checkpoint


class Expert(nn.Module):
    """[M, W] -> [M, W], with an inner width."""

    def __init__(self, width: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    """Stands in for the experts of a layer, its children "0", "1", ...: of them all, or of this rank's after `keep`.

    A row's experts are added in float32 in the order of their numbers, those of a block by themselves, and then the blocks
    as a binary tree: so a row's bits depend neither on other rows nor, if each rank's blocks are a whole branch, on the
    number of ranks. early: weights are those of what experts get, not of what they give. turned: files that
    pack experts have their weights as [inputs, outputs].
    """

    def __init__(
        self, count: int, width: int, inner: int, activation: nn.Module, early: bool = False, turned: bool = False
    ) -> None:
        super().__init__()
        self.early, self.turned = early, turned
        for index in range(count):
            self.add_module(str(index), Expert(width, inner, activation))
        self.count = count
        self._blocks = [Span(0, count)]
        self._comm: Communicator = Solo()

    def keep(self, span: Span, borders: Sequence[int], comm: Communicator) -> None:
        """Lets go of all experts but those of `span`. borders: between its blocks, counted from its start."""
        for index in {*range(self.count)} - {*range(*span)}:
            delattr(self, str(index))
        edges = (0, *borders, span.width)
        self._blocks = [Span(span.start + first, span.start + last) for first, last in pairwise(edges)]
        self._comm = comm

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [M, W], chosen int64 [M, k], the experts of a row, and their weights [M, k] -> [M, W], summed over the ranks."""
        order = torch.argsort(chosen.flatten(), stable=True)
        rows, shares = order // chosen.shape[1], weights.flatten()[order].float()[:, None]
        ends = list(accumulate(torch.bincount(chosen.flatten(), minlength=self.count).tolist(), initial=0))

        def total(blocks: Sequence[Span]) -> Tensor:
            """The sum of blocks, branch after branch, so that few of them are held at a time."""
            if len(blocks) > 1:
                half = len(blocks) // 2
                return total(blocks[:half]) + total(blocks[half:])
            out = torch.zeros_like(x, dtype=torch.float32)
            for index in range(*blocks[0]):
                if ends[index] < ends[index + 1]:
                    sent = slice(ends[index], ends[index + 1])
                    mine, share = rows[sent], shares[sent]
                    given = (x[mine] * share).to(x.dtype) if self.early else x[mine]
                    made = self.get_submodule(str(index))(given).float()
                    out[mine] += made if self.early else made * share
            return out

        return self._comm.all_reduce(total(self._blocks), x.dtype)


class InChunks(nn.Module):
    """A router that sees so many rows at a time, always exactly so many: what libraries make of a row then depends on no
    other (`kernels.reference.CHUNK`)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """x: [M, W] or [1, M, W]; more: what is no row's, such as a bias for each expert -> tensors of M rows."""
        flat = x.reshape(-1, x.shape[-1])
        size = CHUNK.get(x.device.type, 32)
        chunks = functional.pad(flat, (0, 0, 0, -len(flat) % size or size * (len(flat) == 0))).split(size)
        outs = [self.inner(rows.view(*x.shape[:-2], size, -1), *more) for rows in chunks]
        return tuple(torch.cat(parts)[: len(flat)] for parts in zip(*outs, strict=True))


@contextmanager
def choosing(module: nn.Module, choices: list[tuple[Tensor, ...]], again: bool = False) -> Iterator[None]:
    """While it lasts, what is chosen for a module's experts, and their weights, is noted; or, `again`, taken from what was."""

    def send(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if again:
            return args[0], *choices.pop(0)
        choices.append(args[1:])
        return None

    hooks = [experts.register_forward_pre_hook(send) for _, experts in experts_of(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unpack_experts(model: PreTrainedModel) -> None:
    """Puts `Experts` in the place of packed ones, in a skeleton. Raises ModelError for experts that compute another thing."""
    known: set[type[nn.Module]] = set()
    for path, module in list(model.named_modules()):
        turned = getattr(module, "is_transposed", False)
        parameters = dict(module.named_parameters(recurse=False))
        shapes = {name: (x.mT if turned and x.dim() > 1 else x).shape for name, x in parameters.items()}
        if not any(len(shape) == 3 for shape in shapes.values()):
            continue
        count, width, inner = shapes.get("down_proj", (0, 0, 0))
        usual = shapes == {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}
        usual = usual and [name for name, _ in module.named_children()] == ["act_fn"]
        if not usual or not (type(module) in known or _computes_ours(module)):
            raise ModelError(f"{model.config.model_type} has experts that compute something else than gate, up and down")
        known.add(type(module))
        with torch.device("meta"):
            ours = Experts(count, width, inner, module.get_submodule("act_fn"), turned=turned)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, ours)


def _computes_ours(module: nn.Module) -> bool:
    """Whether packed experts of transformers give what ours give, with a few small weights."""
    count, width, inner, rows = 3, 8, 16, 5
    generator = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    shapes = {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}
    packed = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(rows, width, generator=generator)
    chosen = torch.rand(rows, count, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(rows, 2, generator=generator)
    try:
        turned = getattr(module, "is_transposed", False)
        probe._parameters = {name: nn.Parameter(x.mT.contiguous() if turned else x) for name, x in packed.items()}
        probe.num_experts = count  # type: ignore[assignment]
        ours = Experts(count, width, inner, module.get_submodule("act_fn"))
        for index in range(count):
            expert: Any = ours.get_submodule(str(index))
            expert.gate_proj.weight.data, expert.up_proj.weight.data = packed["gate_up_proj"][index].chunk(2)
            expert.down_proj.weight.data = packed["down_proj"][index]
        with torch.no_grad():
            wanted, found = probe(x, chosen, weights), ours(x, chosen, weights)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError):
        return False
    return found.shape == wanted.shape and bool((found - wanted).abs().max() < 1e-4)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The layers' experts by path."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            yield path, module


def unpack_files(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Sees the tensors in which a checkpoint may have a layer's experts packed as those of their linears."""
    for path, experts in experts_of(model):
        for name, parts in PACKED.items():
            inside = [[f"{path}.{index}.{part}.weight" for part in parts] for index in range(experts.count)]
            checkpoint.take_apart(f"{path}.{name}", inside, experts.turned)


def names_in_files(converter: WeightConverter) -> dict[str, str]:
    """Ours of the names that checkpoints have for an expert's linears; {} if the converter packs something else."""
    (target, *others) = converter.target_patterns
    ours = PACKED.get(target.rstrip("$").rpartition("experts.")[2], ())
    theirs = [SOURCE.search(source) for source in converter.source_patterns]
    if others or len(ours) != len(theirs) or not all(theirs):
        return {}
    return {found[1]: name for found, name in zip(theirs, ours, strict=True) if found}


def routers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that choose experts, by path: those beside experts whose only matrix has a row for each."""
    for path, experts in experts_of(model):
        block = path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_children():
            matrices = [x.shape[0] for x in module.parameters() if x.dim() == 2 and len(x) > 1]
            if module is not experts and type(module) is not nn.Linear and matrices == [experts.count]:
                yield f"{block}.{name}".removeprefix("."), module


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linears by path, but for those by which routers choose: these stay as they are, whatever becomes of the others."""
    routers = tuple(f"{path}." for path, _ in routers_of(model))
    return {path: m for path, m in model.named_modules() if type(m) is nn.Linear and not path.startswith(routers)}


def steady_routers(model: nn.Module) -> None:
    """Wraps the routers of a model in `InChunks`, in place."""
    for path, module in list(routers_of(model)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, InChunks(module))
