"""Gated activations: activation(gate) * up, by itself or at the end of a product."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.arguments import check_gated
from runtime.kernels.gpu.dot import narrow

TILE = 1024  # outputs of a program


@triton.jit
def gate(gates, ups, ACTIVATION: tl.constexpr):
    """Tiles of one 16- or 32-bit dtype -> the same; the activation is rounded first. See `reference.gated`."""
    wide = gates.to(tl.float32)
    inner = wide
    if ACTIVATION == "gelu_tanh":
        inner = 1.5957691216 * (wide + 0.044715 * wide * wide * wide)
    e = tl.exp(-tl.abs(inner))
    y = wide * tl.div_rn(tl.where(inner < 0, e, 1.0), 1.0 + e)
    return narrow(narrow(y, gates.dtype).to(tl.float32) * ups.to(tl.float32), gates.dtype)


@triton.jit
def _gated(both, out, stride, width, ACTIVATION: tl.constexpr, TILE: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = d < width
    gates = tl.load(both + row * stride + d, mask=inside, other=0.0)
    ups = tl.load(both + row * stride + width + d, mask=inside, other=0.0)
    tl.store(out + row * width + d, gate(gates, ups, ACTIVATION), mask=inside)


def gated(both: Tensor, activation: str) -> Tensor:
    check_gated(both, activation)
    if both.stride(1) != 1:
        both = both.contiguous()
    rows, width = len(both), both.shape[1] // 2
    out = both.new_empty(rows, width)
    if out.numel():
        grid = rows, triton.cdiv(width, TILE)
        _gated[grid](both, out, both.stride(0), width, ACTIVATION=activation, TILE=TILE, enable_fp_fusion=False)
    return out
