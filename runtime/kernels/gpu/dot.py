"""What Triton's interpreter, which stands in for a GPU in tests, would do otherwise: products of tiles, and rounding."""

import triton
import triton.language as tl

# The interpreter knows no bfloat16 products and gives others to a library whose order of additions changes with their
# shape; and it cuts bfloat16 off instead of rounding, and has no zero in it.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in acc's dtype: [N, K], [K, M], [N, M]; an element's bits depend on its row, its column and acc alone.

    acc is float32, or int32 for tiles of int8, whose sums are exact.
    """
    return (
        acc + tl.sum(a.to(acc.dtype)[:, :, None] * b.to(acc.dtype)[None, :, :], axis=1)
        if INTERPRETED
        else tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    )


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE, to nearest, half to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x == x, up, bits | 0x400000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)
