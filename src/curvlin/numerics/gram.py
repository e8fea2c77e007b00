"""``X^T X`` at little more than half of the work: torch has no product that knows that its result is symmetric.

It is cut into slices of columns, each of which begins at the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

LEAST_WIDTH = 48
"""Columns of a slice, or a multiple of them: a whole number of the register blocks of a matrix kernel, which are 8, 16,
24 or 48 numbers wide."""

COLUMNS = 384
"""Columns of a product for each multiple: narrow slices leave out more, wide ones are multiplied at a higher rate."""


def add_lower_gram(X: Float[Tensor, "n D"], total: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Add ``X^T X`` to `total`, in place, on and below the diagonal; what stands above it is not it."""
    for start, stop in _slices(len(total)):
        total[start:, start:stop].addmm_(X[:, start:].mT, X[:, start:stop])
    return total


def symmetric_of_lower(total: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The symmetric matrix with these entries on and below the diagonal."""
    result = total.clone()
    for start, stop in _slices(len(total)):
        result[start:stop, stop:] = result[stop:, start:stop].mT
        tile = result[start:stop, start:stop]
        tile.copy_(tile.tril() + tile.tril(-1).mT)
    return result


def _slices(size: int) -> Iterator[tuple[int, int]]:
    width = LEAST_WIDTH * -(-size // COLUMNS)
    for start in range(0, size, width):
        yield start, min(start + width, size)
