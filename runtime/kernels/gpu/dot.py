"""The matrix product of two tiles."""

import triton
import triton.language as tl

# Triton's interpreter, which stands in for a GPU in tests, knows no bfloat16 products and gives others to a library
# whose order of additions changes with their shape.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32: [N, K], [K, M], [N, M]; an element's bits depend on its row, its column and acc alone."""
    return (
        acc + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
        if INTERPRETED
        else tl.dot(a, b, acc, input_precision=PRECISION)
    )
