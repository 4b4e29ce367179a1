"""The kernels in Triton, for GPUs; every function's docstring stands beside the reference's function of the same name.

On a device nothing is checked that only its memory knows - slots, blocks, positions - as a look would stop the device
in every layer: what lies outside its table or cache counts as unseen, or isn't written. `runtime.batch` checks these on
the host. Four-bit products of eight-bit activations, and a screened head's `floors` and `refine`, have no kernel
of their own here and are the reference's.
"""

from runtime.kernels.gpu.attention import paged_attention
from runtime.kernels.gpu.cache import write_cache
from runtime.kernels.gpu.dense import dense_linear, head_best, int8_linear
from runtime.kernels.gpu.gates import gated
from runtime.kernels.gpu.layer import rms_norm, rotary_write
from runtime.kernels.gpu.linear import int4_linear, pack_int4
from runtime.kernels.gpu.sampling import best_tokens, candidates, masses
from runtime.kernels.reference import floors, pack_int8, quantize_int4, refine

SEGMENTS = False  # products have pieces of their own

__all__ = [
    "best_tokens", "candidates", "dense_linear", "floors", "gated", "head_best", "int4_linear", "int8_linear", "masses",
    "pack_int4", "pack_int8", "paged_attention", "quantize_int4", "refine", "rms_norm", "rotary_write", "write_cache",
]  # fmt: skip
