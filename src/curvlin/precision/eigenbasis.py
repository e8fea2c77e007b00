"""Precisions whose eigenvectors are known beforehand: everything is elementwise in the eigenvalues.

    P = Q diag(lambda) Q^T,   Q orthogonal,   f(P) = Q diag(f(lambda)) Q^T

Q is a constant to derivatives and is never formed: a subclass says how to apply it (a pair of small rotations, a
fast transform), what lambda is, and how it is scaled. All answers follow, exact to rounding and differentiable.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator


class EigenbasisOperator(PrecisionOperator):
    """``Q diag(lambda) Q^T`` with a constant orthogonal Q, given by five hooks and `_scale`.

    Marginals and conditionals are dense, up to their `max_size`; override the hooks where they have structure.
    """

    # -- what a subclass says, besides `size` and `_scale` ----------------------------------------------------

    @abstractmethod
    def _eigenvalues(self) -> Tensor:
        """lambda, ``(..., D)``, by differentiable operations on the tensors of the operator."""

    @abstractmethod
    def _to_basis(self, X: Tensor) -> Tensor:
        """``Q^T X`` for ``X`` of shape ``(..., D, K)``."""

    @abstractmethod
    def _from_basis(self, V: Tensor) -> Tensor:
        """``Q V``."""

    @abstractmethod
    def _diagonal_of(self, values: Tensor) -> Tensor:
        """The diagonal ``sum_j Q_ij^2 values_j`` of ``Q diag(values) Q^T``, ``(..., D)``."""

    # -- what follows -----------------------------------------------------------------------------------------

    def _function(self, values: Tensor, X: Tensor) -> Tensor:
        """``Q diag(values) Q^T X``."""
        return self._from_basis(values.unsqueeze(-1) * self._to_basis(X))

    def _factorize(self) -> None:
        values = self._eigenvalues()
        if not bool((values > 0).all()):
            raise NotPositiveDefiniteError(type(self).__name__, float(values.min()))

    def _matmul(self, X: Tensor) -> Tensor:
        return self._function(self._eigenvalues(), X)

    def _solve(self, X: Tensor, factors: None) -> Tensor:
        return self._function(1 / self._eigenvalues(), X)

    def _inv_quad(self, X: Tensor, factors: None) -> Tensor:
        return (self._to_basis(X).square() / self._eigenvalues().unsqueeze(-1)).sum(-2)

    def _logdet(self, factors: None) -> Tensor:
        return self._eigenvalues().log().sum(-1)

    def _diagonal(self) -> Tensor:
        return self._diagonal_of(self._eigenvalues())

    def _inverse_diagonal(self, factors: None) -> Tensor:
        return self._diagonal_of(1 / self._eigenvalues())

    # The symmetric root: R = R^T = Q diag(sqrt(lambda)) Q^T.

    def _whiten(self, X: Tensor, factors: None) -> Tensor:
        return self._function(self._eigenvalues().sqrt(), X)

    def _unwhiten(self, Z: Tensor, factors: None) -> Tensor:
        return self._function(self._eigenvalues().rsqrt(), Z)

    def _root_matvec(self, Z: Tensor, factors: None) -> Tensor:
        return self._function(self._eigenvalues().sqrt(), Z)

    def _root_solve(self, G: Tensor, factors: None) -> Tensor:
        return self._function(self._eigenvalues().rsqrt(), G)

    def _marginal(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        return None

    def _conditional(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        return None

    def _to_dense(self) -> Tensor:
        dense = self._matmul(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return (dense + dense.mT) / 2
