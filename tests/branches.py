"""The order in which sums over ranks and over segments of a product are added."""

from torch import Tensor


def branches(parts: list[Tensor]) -> Tensor:
    """A binary tree: the sum of the first ones, as many as the largest power of two that leaves some, and of the rest."""
    half = next((n for n in (16, 8, 4, 2, 1) if n < len(parts)), 0)
    return branches(parts[:half]) + branches(parts[half:]) if half else parts[0]
