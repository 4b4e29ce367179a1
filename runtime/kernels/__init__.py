"""Kernels: modules with the same functions and the same signatures, one for each kind of device.

`reference.py` has the docstrings. A row's result has the same bits whatever rows stand beside it.
"""

import functools
import logging
from types import ModuleType

import torch

log = logging.getLogger(__name__)


@functools.cache
def select(device: torch.device) -> ModuleType:
    """The module for a device: the C++ extension's on a CPU, built on first use; else the reference, with a warning."""
    from runtime.kernels import reference
    from runtime.kernels.build import BuildError

    if device.type != "cpu":
        return reference
    try:
        from runtime.kernels import cpu
    except BuildError as error:
        log.warning("falling back to the reference kernels, which are many times slower: %s", error)
        return reference
    return cpu
