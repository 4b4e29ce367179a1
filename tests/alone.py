"""Refuses what a CUDA graph cannot capture, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.batch import Batch, Piece
from runtime.comm import Solo
from runtime.kv_cache import KVCache
from runtime.model import load_model
from tests.tiny_models import BLOCK, BLOCKS, config_of

REFUSED = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "lift_fresh", "masked_select", "nonzero",
    "unique_dim",
}  # fmt: skip


MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}


class Unasking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in REFUSED, f"a round asks the host: {func}"
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        assert name not in ("index", "index_put", "index_put_") or all(x is args[0] for x in masks), f"{func} counts a mask"
        return func(*args, **kwargs or {})


class Placed(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        assert name not in MAKERS or kwargs.get("device") is not None, f"torch.{name} makes a tensor of the host's"
        return func(*args, **kwargs)


@contextmanager
def alone() -> Iterator[None]:
    """Refuses what would make a device wait for the host, or read the host's memory, and so end the capture of a graph."""
    with Unasking(), Placed():
        yield


def check_capturable(directory: Path) -> None:
    """That a pass of the model stored there, but for its first, asks nothing of the host, if passes are to be captured."""
    model = load_model(config_of(directory), Solo())
    if model.capturable:
        cache = KVCache(model.cache_shape, BLOCKS, BLOCK, model.dtype)
        batch = Batch.build([Piece([1, 2, 3], 2, [0], 3), Piece([4], 20, [1, 2, 3], 1)], BLOCK)
        model.forward(batch, cache)
        with alone():
            model.forward(batch, cache)
