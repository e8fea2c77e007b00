"""The precision without structure: a matrix and its Cholesky factor, O(D^3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import symmetric
from curvlin._tree import Tree, tensor_field
from curvlin.numerics.cholesky import follow, normalised_cholesky
from curvlin.precision.implicit import ImplicitLogdetOperator


@dataclass(eq=False, repr=False)
class CholeskyFactors(Tree):
    """``P = s L L^T`` with s a power of two, so that solves do not depend on the scale of P."""

    lower: Tensor = tensor_field(2)
    scale: Tensor = tensor_field(0)

    @property
    def root(self) -> Tensor:
        """``sqrt(s) L``."""
        return self.lower * self.scale.sqrt()[..., None, None]


@dataclass(eq=False, repr=False, init=False)
class Dense(ImplicitLogdetOperator):
    """A symmetric matrix, factorised by Cholesky.

    Args:
        matrix: ``(*batch, D, D)``, symmetric to rounding; stored symmetrised.

    Raises:
        TypeError: if it is not a floating tensor.
        ValueError: if it is not square, not symmetric, empty, or not finite.
    """

    matrix: Float[Tensor, "*batch D D"] = tensor_field(2)

    def __init__(self, matrix: Float[Tensor, "*batch D D"]) -> None:
        self.matrix = symmetric("matrix", matrix)

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    def _factorize(self) -> CholeskyFactors:
        return CholeskyFactors(*normalised_cholesky(self.matrix, "Dense"))

    def _matmul(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _solve_value(self, X: Tensor, factors: CholeskyFactors) -> Tensor:
        lower, X = _broadcast(factors.lower, X)
        return torch.cholesky_solve(X, lower) / factors.scale[..., None, None]

    def _inv_quad_value(self, X: Tensor, factors: CholeskyFactors) -> Tensor:
        lower, X = _broadcast(factors.lower, X)
        return (
            torch.linalg.solve_triangular(lower, X, upper=False).square().sum(-2) / factors.scale[..., None]
        )

    def _logdet_value(self, factors: CholeskyFactors) -> Tensor:
        pivots = factors.lower.diagonal(dim1=-2, dim2=-1)
        return 2 * pivots.log().sum(-1) + self.size * factors.scale.log()

    def _logdet_gradient(self, factors: CholeskyFactors) -> list[Tensor]:
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return [self._solve(eye, factors)]

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def _inverse_diagonal(self, factors: CholeskyFactors) -> Tensor:
        # The squared norms of the columns of L^-1: a sum of squares has no cancellation.
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self._inv_quad(eye, factors)

    def _root(self, factors: CholeskyFactors) -> Tensor:
        root = factors.root
        return follow(root, self.matrix) if self._needs_grad() else root

    def _whiten(self, X: Tensor, factors: CholeskyFactors) -> Tensor:
        return self._root(factors).mT @ X

    def _unwhiten(self, Z: Tensor, factors: CholeskyFactors) -> Tensor:
        return torch.linalg.solve_triangular(self._root(factors).mT, Z, upper=True)

    def _root_matvec(self, Z: Tensor, factors: CholeskyFactors) -> Tensor:
        return self._root(factors) @ Z

    def _root_solve(self, G: Tensor, factors: CholeskyFactors) -> Tensor:
        return torch.linalg.solve_triangular(self._root(factors), G, upper=False)

    def _scale(self, c: Tensor) -> Dense:
        return self._with(matrix=self.matrix * c[..., None, None])

    def _marginal(self, index: Tensor, max_size: int) -> None:
        return None

    def _conditional(self, index: Tensor, max_size: int) -> Dense:
        return Dense(self.matrix[..., index[:, None], index])

    def _to_dense(self) -> Tensor:
        return self.matrix


def _broadcast(lower: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Batch dimensions made equal, which `torch.cholesky_solve` asks for."""
    batch = torch.broadcast_shapes(lower.shape[:-2], X.shape[:-2])
    return lower.expand(*batch, *lower.shape[-2:]), X.expand(*batch, *X.shape[-2:])
