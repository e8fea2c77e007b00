"""Sums of ``X^T X`` over a stream of rows: what the factors of a Kronecker product are made of.

Products are in float64 unless another dtype is asked for, sums of products in float64 always.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture import OneHot

TILES = 4
"""Into how many slices of columns a large product is cut, so that what lies below its diagonal is left out."""

TILED_SIZE = 256
"""The least size of a product that pays for it."""

AT_ONCE = 2**18
"""Entries of the rows that are converted and multiplied at once, which stay in cache."""

LEAST_ROWS = 2**9
"""Rows that are multiplied at once at least: each product reads and writes the whole sum."""

PAD = 16
"""Columns that a buffer of rows has more than are used: at a stride of 512 numbers, rows fall on the same few lines of
a cache and a product takes up to half as long again."""

RUN = 16
"""Numbers of one column that stand side by side in images at least, for a buffer with columns one after another."""


class GramSum:
    """``sum_b X_b^T X_b``, of which fewer rows than columns wait to be multiplied together.

    Adding a product to the sum reads and writes D^2 numbers. Rows are kept until there are as many as columns, which
    takes no more memory than the sum itself.

    Args:
        size: D, the number of columns.
        dtype: that of the products. In float64 the product of few rows has no more rank than they have, whatever the
            dtype of the rows, but for rounding that any prior precision in use outweighs.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float64) -> None:
        self.size, self.dtype = size, dtype
        self._waiting: list[Tensor] = []
        self._sum: Tensor | None = None
        self._counts: Tensor | None = None

    def copy(self) -> GramSum:
        """A sum of its own over the same rows."""
        other = GramSum(self.size, self.dtype)
        other.merge(self)
        return other

    def add(self, X: Float[Tensor, "*batch n D"]) -> None:
        """Add the rows of X, whose leading axes are more rows."""
        X = _in_order_of_memory(X)
        if X.shape[:-1].numel() >= self.size:
            self._multiply(X)
            return
        self._waiting.append(X.reshape(-1, self.size).clone())
        if sum(map(len, self._waiting)) >= self.size:
            self._settle()

    def add_units(self, X: OneHot) -> None:
        """Add rows that are unit vectors, whose product is the diagonal of their numbers."""
        counts = X.counts()
        self._counts = counts if self._counts is None else self._counts + counts

    def add_product(self, product: Float[Tensor, "D D"]) -> None:
        """Add ``X^T X`` of rows that need not be known, in full and float64."""
        self._sum = product.clone() if self._sum is None else self._sum.add_(product)

    def merge(self, other: GramSum) -> None:
        """Add the sum over other rows, which stays as it is."""
        if other._counts is not None:
            self._counts = other._counts.clone() if self._counts is None else self._counts + other._counts
        self._waiting += other._waiting
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
        if sum(map(len, self._waiting)) >= self.size:
            self._settle()

    def value(self) -> Float[Tensor, "D D"]:
        """The sum, float64."""
        self._settle()
        if self._sum is None and self._counts is not None:
            return torch.diag(self._counts)
        if self._sum is None:
            return torch.zeros(self.size, self.size, dtype=torch.float64)
        value = self._sum.clone()
        for start, stop in _tiles(self.size):
            value[stop:, start:stop] = value[start:stop, stop:].mT
            tile = value[start:stop, start:stop]
            tile.copy_(tile.triu() + tile.triu(1).mT)  # symmetric beyond the rounding of a product
        if self._counts is not None:
            value.diagonal().add_(self._counts)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The rows that wait as they are: multiplied together now, they would not round as they will."""
        return {
            "size": self.size,
            "waiting": list(self._waiting),
            "sum": self._sum,
            "counts": self._counts,
        }

    @classmethod
    def of(cls, state: dict[str, Any], dtype: torch.dtype) -> GramSum:
        """The sum that had this `state_dict`."""
        gram = cls(state["size"], dtype)
        gram._waiting, gram._sum, gram._counts = list(state["waiting"]), state["sum"], state["counts"]
        return gram

    def _settle(self) -> None:
        if self._waiting:
            rows, self._waiting = torch.cat(self._waiting), []
            self._multiply(rows)

    def _multiply(self, X: Tensor) -> None:
        if self._sum is None:
            self._sum = torch.zeros(self.size, self.size, dtype=torch.float64, device=X.device)
        if self.dtype == torch.float64:
            add_upper_gram(X, self._sum)
        else:
            self._sum += add_upper_gram(X, torch.zeros_like(self._sum, dtype=self.dtype))


def add_upper_gram(X: Float[Tensor, "*batch n D"], total: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Add ``X^T X`` to `total`, in its dtype, on and above the diagonal tiles; what stands below them is not it."""
    for part in _converted(X, total.dtype):
        for start, stop in _tiles(len(total)):
            total[start:stop, start:].addmm_(part[:, start:stop].mT, part[:, start:])
    return total


def _converted(X: Float[Tensor, "*batch n D"], dtype: torch.dtype) -> Iterator[Float[Tensor, "k D"]]:
    """Some rows at a time, in one buffer that has the order of memory of X: rows, or columns (images) side by side."""
    n, size = X.shape[-2:]
    rows = max(LEAST_ROWS, AT_ONCE // size)
    if X.ndim == 2 or X.stride(-2) != 1 or n < RUN:
        X, pad = X.reshape(-1, size), PAD if size >= TILED_SIZE else 0
        buffer = torch.empty(min(rows, len(X)), size + pad, dtype=dtype, device=X.device)
        for part in X.split(rows):
            yield buffer[: len(part), :size].copy_(part)
        return
    X = X.flatten(0, -3)
    buffer = torch.empty(size, min(rows, X.shape[:2].numel()) + PAD, dtype=dtype, device=X.device)
    for images in X.split(max(1, rows // n)):
        for part in images.split(rows, dim=1):
            n_rows = part.shape[:2].numel()
            buffer[:, :n_rows].unflatten(1, part.shape[:2]).copy_(part.permute(2, 0, 1))
            yield buffer[:, :n_rows].mT


def _tiles(size: int) -> Iterator[tuple[int, int]]:
    step = size if size < TILED_SIZE else -(-size // TILES)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _in_order_of_memory(X: Tensor) -> Tensor:
    """The same rows with axes before the last two permuted such that they can be made one without a copy."""
    leading = sorted(range(X.ndim - 2), key=lambda axis: -X.stride()[axis])
    return X.permute(*leading, -2, -1)
