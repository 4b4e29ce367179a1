"""Where the GPU's kernels are tested: on a GPU if there is one, else in Triton's interpreter.

The interpreter shows that the work is divided and put together rightly, and that a row is alone in that. Whether the
device's own instructions keep to it is for the tests marked `gpu`. Importing this skips a test module without triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton isn't installed", allow_module_level=True)
import triton

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and not triton.knobs.runtime.interpret:
    pytest.skip("no GPU, and something imported triton before TRITON_INTERPRET=1 was set", allow_module_level=True)

from runtime.kernels import gpu  # noqa: E402
from runtime.kernels.gpu import table as tables  # noqa: E402
from runtime.quantize.int4 import Int4Weight  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
TABLE = tables.parse((tables.FOLDER / "default.json").read_text())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
# NaN and infinities are part of what is tested, and the interpreter's numpy warns of them.
quiet = pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the device, with its arguments and results on the CPU; what it writes into comes back, too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        moved = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in args]
        result = function(*moved, **kwargs)
        for x, y in zip(args, moved, strict=True):
            if isinstance(x, Tensor) and x is not y:
                x.copy_(y)
        return tuple(x.cpu() for x in result) if isinstance(result, tuple) else None if result is None else result.cpu()

    return call


def pack(weight: Int4Weight, activations: str = "16bit") -> Any:
    moved = Int4Weight(weight.codes.to(DEVICE), weight.scale.to(DEVICE), weight.zero.to(DEVICE), weight.group_size)
    return gpu.pack_int4(moved, activations)


MODULE: Any = SimpleNamespace(**{name: there(getattr(gpu, name)) for name in gpu.__all__ if "pack" not in name})
