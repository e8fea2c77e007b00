"""Sums of ``X^T X`` over a stream of rows: what the factors of a Kronecker product are made of.

Products are in float64 unless another dtype is asked for, sums of products in float64 always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin.numerics.gram import add_lower_gram, symmetric_of_lower
from curvlin_nn.capture import OneHot

AT_ONCE = 2**18
"""Entries of the rows that are converted and multiplied at once, which stay in cache."""

LEAST_ROWS = 2**9
"""Rows that are multiplied at once at least: each product reads and writes the whole sum."""

PAD = 16
"""Numbers from the end of a row of a buffer to the next one, if rows have a multiple of `ALIASED` numbers."""

ALIASED = 128
"""At such strides, rows fall on the same few lines of a cache, and a product takes up to half as long again."""

RUN = 16
"""Numbers of one column that stand side by side in images at least, for a buffer with columns one after another."""


class GramSum:
    """``sum_b X_b^T X_b``, of which few rows wait to be multiplied together.

    Adding a product to the sum reads and writes D^2 numbers. Rows are kept until they take as much memory as the sum
    itself.

    Args:
        size: D, the number of columns.
        dtype: that of the products. In float64 the product of few rows has no more rank than they have, whatever the
            dtype of the rows, but for rounding that any prior precision in use outweighs.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float64) -> None:
        self.size, self.dtype = size, dtype
        self._buffer: Tensor | None = None  # rows, of which the first ones wait
        self._n_waiting = 0
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
        if X.shape[:-1].numel() < self.size:
            self._wait(X.reshape(-1, self.size))
        else:
            self._multiply(_converted(X, self.dtype), X.device)

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
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
        for rows in other._waiting():
            self._wait(rows)

    def value(self) -> Float[Tensor, "D D"]:
        """The sum, float64."""
        self._settle()
        if self._sum is None and self._counts is not None:
            return torch.diag(self._counts)
        if self._sum is None:
            return torch.zeros(self.size, self.size, dtype=torch.float64)
        value = symmetric_of_lower(self._sum)  # beyond the rounding of a product
        if self._counts is not None:
            value.diagonal().add_(self._counts)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The rows that wait as they are: multiplied together now, they would not round as they will."""
        return {
            "size": self.size,
            "waiting": [rows.clone() for rows in self._waiting()],
            "sum": self._sum,
            "counts": self._counts,
        }

    @classmethod
    def of(cls, state: dict[str, Any], dtype: torch.dtype) -> GramSum:
        """The sum that had this `state_dict`."""
        gram = cls(state["size"], dtype)
        gram._sum, gram._counts = state["sum"], state["counts"]
        for rows in state["waiting"]:
            gram._wait(rows)
        return gram

    def _waiting(self) -> list[Float[Tensor, "n D"]]:
        """The rows that wait, if there are any."""
        return [] if self._buffer is None or not self._n_waiting else [self._buffer[: self._n_waiting]]

    def _wait(self, X: Float[Tensor, "n D"]) -> None:
        """Put rows behind those that wait; whenever they take the memory of the sum, multiply them."""
        if self._buffer is None:
            of_sum = self.size**2 * torch.float64.itemsize
            n = max(1, of_sum // (_stride(self.size) * self.dtype.itemsize))
            self._buffer = _rows(n, self.size, self.dtype, X.device)
        while len(X):
            some = self._buffer[self._n_waiting :][: len(X)]
            some.copy_(X[: len(some)])
            X, self._n_waiting = X[len(some) :], self._n_waiting + len(some)
            if self._n_waiting == len(self._buffer):
                self._settle()

    def _settle(self) -> None:
        for rows in self._waiting():
            self._multiply([rows], rows.device)
        self._n_waiting = 0

    def _multiply(self, parts: Iterable[Float[Tensor, "k D"]], device: torch.device) -> None:
        """Add the product of rows in `dtype`."""
        if self._sum is None:
            self._sum = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
        single = self.dtype != torch.float64
        product = torch.zeros_like(self._sum, dtype=self.dtype) if single else self._sum
        for part in parts:
            add_lower_gram(part, product)
        if single:
            self._sum += product


def _converted(X: Float[Tensor, "*batch n D"], dtype: torch.dtype) -> Iterator[Float[Tensor, "k D"]]:
    """Some rows at a time, in one buffer that has the order of memory of X: rows, or columns (images) side by side."""
    n, size = X.shape[-2:]
    rows = max(LEAST_ROWS, AT_ONCE // size)
    if X.ndim == 2 or X.stride(-2) != 1 or n < RUN:
        X = X.reshape(-1, size)
        buffer = _rows(min(rows, len(X)), size, dtype, X.device)
        for part in X.split(rows):
            yield buffer[: len(part)].copy_(part)
        return
    X = X.flatten(0, -3)
    buffer = torch.empty(size, min(rows, X.shape[:2].numel()) + PAD, dtype=dtype, device=X.device)
    for images in X.split(max(1, rows // n)):
        for part in images.split(rows, dim=1):
            n_rows = part.shape[:2].numel()
            buffer[:, :n_rows].unflatten(1, part.shape[:2]).copy_(part.permute(2, 0, 1))
            yield buffer[:, :n_rows].mT


def _rows(n: int, size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n size"]:
    """Room for rows."""
    return torch.empty(n, _stride(size), dtype=dtype, device=device)[:, :size]


def _stride(size: int) -> int:
    """From one row to the next."""
    return size if size % ALIASED else size + PAD


def _in_order_of_memory(X: Tensor) -> Tensor:
    """The same rows with all axes but the last permuted such that they can be made one without a copy."""
    leading = sorted(range(X.ndim - 1), key=lambda axis: -X.stride()[axis])
    return X.permute(*leading, -1)
