"""Kernels: modules with the same functions and the same signatures, one for each kind of device.

`reference.py` has the docstrings. A row's result has the same bits whatever rows stand beside it.
"""

import functools
import importlib.util
import logging
from types import ModuleType

import torch

log = logging.getLogger(__name__)


@functools.cache
def select(device: torch.device) -> ModuleType:
    """The module for a device: C++ on a CPU, built on first use, Triton on a GPU; else the reference, with a warning."""
    from runtime.kernels import reference
    from runtime.kernels.build import BuildError

    if device.type == "cuda":
        return _for_gpus()
    if device.type != "cpu":
        return reference
    try:
        from runtime.kernels import cpu
    except BuildError as error:
        log.warning("falling back to the reference kernels, which are many times slower: %s", error)
        return reference
    return cpu


@functools.cache
def _for_gpus() -> ModuleType:
    from runtime.kernels import reference

    if importlib.util.find_spec("triton") is None:
        log.warning("falling back to the reference kernels, which are many times slower: triton isn't installed")
        return reference
    from runtime.kernels import gpu

    return gpu
