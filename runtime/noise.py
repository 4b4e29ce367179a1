"""Keyed Gumbel noise: a function of (seed, position, token id) and nothing else.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as
its key and (token id, position, 0, 0) as its counter. No state is kept, so any rank can compute the noise of its own
slice of the vocabulary, at any time, again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

SMALLEST = -math.log(24 * math.log(2))  # of u = 2**-24
LARGEST = -math.log(-math.log1p(-(2.0**-24)))  # of u = 1 - 2**-24
SPREAD = LARGEST - SMALLEST + 1e-3  # a token this far under the best can never win; a margin for float32's logarithms


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold unsigned 32-bit words; all broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, which int64 cannot hold unsigned: 16 bits of the constant at a time."""
    low = word * (constant & 0xFFFF)  # < 2**48
    high = word * (constant >> 16)  # < 2**48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, in [SMALLEST, LARGEST].

    seeds, positions, tokens: int64, any shapes that broadcast; the result has the broadcast shape.
    """
    zero = torch.zeros((), dtype=torch.int64, device=tokens.device)
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    word = philox((tokens, positions, zero, zero), key)[0]
    uniform = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23  # 24 significant bits: exact, and never 0 or 1
    return -torch.log(-torch.log(uniform))
