"""Sums, exponentials and hyperbolic tangents whose bits depend neither on an element's place nor on its neighbours."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fold(x: Tensor) -> Tensor:
    """[..., n] -> [...]: the sum, in an order that n alone fixes."""
    n = 1 << max(0, x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, n - x.shape[-1]))
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


def tree(parts: Sequence[Tensor]) -> Tensor:
    """The sum of equal shapes, as a binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), and what is left over last.

    Whoever holds a whole branch can add it up alone, and nobody's result changes.
    """
    parts = list(parts)
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) & ~1 :]
    return parts[0]


def exp(x: Tensor) -> Tensor:
    """e^x in float32 for x <= 0, from additions and products alone; torch's own may differ at the end of a tensor."""
    clamped = x.clamp(min=-87.0)
    n = torch.round(clamped * 1.44269504)
    r = clamped - n * 0.693359375 + n * 2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    y = (p * (r * r) + r + 1.0) * ((n.int() + 127) << 23).view(torch.float32)
    return y.where(x >= -87.0, 0.0)


def tanh(x: Tensor) -> Tensor:
    """float32, of any x, by `exp`."""
    e = exp(-2.0 * x.abs())
    return torch.sign(x) * ((1.0 - e) / (1.0 + e))
