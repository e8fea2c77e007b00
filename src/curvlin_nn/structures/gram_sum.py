"""Sums of ``X^T X`` over a stream of rows: what the factors of a Kronecker product are made of.

Products are in the dtype of the rows (half precision in float32), sums of products in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

TILES = 4
"""Into how many slices of columns a large product is cut, so that what lies below its diagonal is left out."""

TILED_SIZE = 256
"""The least size of a product that pays for it."""

PRODUCT_BUDGET = 2**20
"""Entries of the products of single matrices that are held at once."""


class GramSum:
    """``sum_b X_b^T X_b``, of which fewer rows than columns wait to be multiplied together.

    Adding a product to the sum reads and writes D^2 numbers. Rows are kept until there are as many as columns, which
    takes no more memory than the sum itself.

    Args:
        size: D, the number of columns.

    Attributes:
        dtype: that of the products, the accuracy of the sum; None before the first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: list[Tensor] = []
        self._sum: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def copy(self) -> GramSum:
        """A sum of its own over the same rows."""
        other = GramSum(self.size)
        other.merge(self)
        return other

    def add(self, X: Float[Tensor, "*batch n D"]) -> None:
        """Add the rows of X, whose leading axes are more rows."""
        X = _in_order_of_memory(X.to(torch.float32) if X.dtype in (torch.float16, torch.bfloat16) else X)
        self.dtype = X.dtype
        if X.ndim > 2 and X.stride(-1) != 1 and X.stride(-2) == 1 and X.shape[-2] >= 2 * self.size:
            self._plus(_by_matrix(X))  # images with channels first: a product for each image, and no copy
        elif X.shape[:-1].numel() < self.size:
            self._waiting.append(X.reshape(-1, self.size).clone())
            if sum(map(len, self._waiting)) >= self.size:
                self._settle()
        else:
            self._plus(upper_gram(X.reshape(-1, self.size)))

    def merge(self, other: GramSum) -> None:
        """Add the sum over other rows, which stays as it is."""
        self._waiting += other._waiting
        self.dtype = self.dtype or other.dtype
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
        if sum(map(len, self._waiting)) >= self.size:
            self._settle()

    def value(self) -> Float[Tensor, "D D"]:
        """The sum, float64."""
        self._settle()
        if self._sum is None:
            return torch.zeros(self.size, self.size, dtype=torch.float64)
        value = self._sum.clone()
        for start, stop in _tiles(self.size):
            value[stop:, start:stop] = value[start:stop, stop:].mT
            tile = value[start:stop, start:stop]
            tile.copy_(tile.triu() + tile.triu(1).mT)  # symmetric beyond the rounding of a product
        return value

    def _settle(self) -> None:
        if self._waiting:
            rows, self._waiting = torch.cat(self._waiting), []
            self._plus(upper_gram(rows))

    def _plus(self, product: Tensor) -> None:
        self._sum = product.double() if self._sum is None else self._sum.add_(product)


def upper_gram(X: Float[Tensor, "n D"]) -> Float[Tensor, "D D"]:
    """``X^T X`` on and above the diagonal tiles; what stands below them is not it."""
    size = X.shape[-1]
    if size < TILED_SIZE:
        return X.mT @ X
    product = X.new_empty(size, size)
    for start, stop in _tiles(size):
        product[start:stop, start:] = X[:, start:stop].mT @ X[:, start:]
        product[stop:, start:stop] = 0
    return product


def _tiles(size: int) -> Iterator[tuple[int, int]]:
    step = size if size < TILED_SIZE else -(-size // TILES)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _by_matrix(X: Float[Tensor, "*batch n D"]) -> Float[Tensor, "D D"]:
    """The sum of one product for each matrix."""
    matrices = X.flatten(0, -3)
    at_once = max(1, PRODUCT_BUDGET // X.shape[-1] ** 2)
    return torch.stack([(part.mT @ part).sum(0) for part in matrices.split(at_once)]).sum(0)


def _in_order_of_memory(X: Tensor) -> Tensor:
    """The same rows with axes before the last two permuted such that they can be made one without a copy."""
    leading = sorted(range(X.ndim - 2), key=lambda axis: -X.stride()[axis])
    return X.permute(*leading, -2, -1)
