"""The truth to 80 digits: solves, determinants and inverses in arbitrary precision, for up to 60 rows."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from curvlin.precision.base import PrecisionOperator

MAX_SIZE = 60


class Reference:
    """An SPD matrix held to `digits` decimal digits, and what it implies, rounded once to float64 at the end.

    Args:
        matrix: a square array: float64, or an object array of mpmath numbers for entries beyond float64.
        digits: the working precision.

    Raises:
        ValueError: if the matrix is not square, has more than 60 rows, or is not positive definite.
    """

    def __init__(self, matrix: Any, digits: int = 80) -> None:
        if isinstance(matrix, Tensor):
            matrix = matrix.detach().cpu().double().numpy()
        array = np.asarray(matrix)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ValueError(f"matrix must be square and without batch, found shape {array.shape}")
        if array.shape[0] > MAX_SIZE:
            raise ValueError(f"matrix must have at most {MAX_SIZE} rows, found {array.shape[0]}")
        self.digits = digits
        self.size = array.shape[0]
        with mpmath.workdps(digits):
            self._matrix = mpmath.matrix(array.tolist())
            try:
                self._root = mpmath.cholesky(self._matrix)
            except ValueError:
                raise ValueError(
                    f"matrix must be positive definite to {digits} digits, found that it is not"
                ) from None

    def logdet(self) -> Tensor:
        """``log det P``, 0-dim float64."""
        with mpmath.workdps(self.digits):
            total = 2 * mpmath.fsum(mpmath.log(self._root[i, i]) for i in range(self.size))
            return torch.tensor(float(total), dtype=torch.float64)

    def solve(self, X: Tensor) -> Tensor:
        """``P^-1 X`` for a vector or a matrix of columns, float64."""
        columns = X.detach().double().reshape(self.size, -1)
        with mpmath.workdps(self.digits):
            solved = [_floats(self._back(self._forward(c))) for c in columns.mT.tolist()]
        return torch.tensor(solved, dtype=torch.float64).mT.reshape(X.shape)

    def inv_quad(self, x: Tensor) -> Tensor:
        """``x^T P^-1 x`` of one vector, 0-dim float64."""
        with mpmath.workdps(self.digits):
            total = mpmath.fsum(v * v for v in self._forward(x.detach().double().tolist()))
            return torch.tensor(float(total), dtype=torch.float64)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of ``P^-1``, float64."""
        entries = []
        with mpmath.workdps(self.digits):
            for i in range(self.size):
                unit = [0] * self.size
                unit[i] = 1
                entries.append(float(mpmath.fsum(v * v for v in self._forward(unit))))
        return torch.tensor(entries, dtype=torch.float64)

    def _forward(self, b: list[Any]) -> list[Any]:
        """``L^-1 b``."""
        L = self._root
        y: list[Any] = []
        for i in range(self.size):
            y.append((b[i] - mpmath.fdot((L[i, j], y[j]) for j in range(i))) / L[i, i])
        return y

    def _back(self, y: list[Any]) -> list[Any]:
        """``L^-T y``."""
        L, x = self._root, [mpmath.mpf(0)] * self.size
        for i in reversed(range(self.size)):
            x[i] = (y[i] - mpmath.fdot((L[j, i], x[j]) for j in range(i + 1, self.size))) / L[i, i]
        return x


def reference(P: PrecisionOperator | Any, digits: int = 80) -> Reference:
    """The `Reference` of an operator without batch (as its float64 dense matrix), or of a matrix."""
    matrix = P.to(torch.float64).to_dense() if isinstance(P, PrecisionOperator) else P
    return Reference(matrix, digits)


def _floats(values: list[Any]) -> list[float]:
    return [float(v) for v in values]
