"""Operators whose derivatives follow from their product alone; see `curvlin.numerics.implicit`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from curvlin.numerics import implicit
from curvlin.precision.base import PrecisionOperator


class ImplicitOperator(PrecisionOperator):
    """An operator that gives values from a factorisation, and is differentiated through its product."""

    def _solve(self, X: Tensor, factors: Any) -> Tensor:
        return implicit.solve(self, X, factors)

    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        return implicit.inv_quad(self, X, factors)

    def _inv_quad_and_solution(self, X: Tensor, factors: Any) -> tuple[Tensor, Tensor]:
        """`_inv_quad_value` and `_solve_value`, for operators that get one on the way to the other."""
        return self._inv_quad_value(X, factors), self._solve_value(X, factors)

    @abstractmethod
    def _solve_value(self, X: Tensor, factors: Any) -> Tensor:
        """``P^-1 X``; autograd does not look inside."""

    @abstractmethod
    def _inv_quad_value(self, X: Tensor, factors: Any) -> Tensor:
        """``x^T P^-1 x`` of each column, as a sum of squares; autograd does not look inside."""


class ImplicitLogdetOperator(ImplicitOperator):
    """One whose ``log det`` is differentiated through ``tr(P^-1 dP)``, which it gives in closed form."""

    def _logdet(self, factors: Any) -> Tensor:
        return implicit.log_det(self, factors)

    @abstractmethod
    def _logdet_value(self, factors: Any) -> Tensor:
        """``log det P``; autograd does not look inside."""

    def _logdet_pull_back(self, g: Tensor, factors: Any) -> list[Tensor]:
        """The gradients of ``<g, log det P>`` for the tensors of P."""
        gradients = self._logdet_gradient(factors)
        pairs = zip(self._tensors(), gradients, strict=True)
        return [
            (g[(..., *(None,) * own)] * gradient).sum_to_size(leaf.shape) for (leaf, own), gradient in pairs
        ]

    @abstractmethod
    def _logdet_gradient(self, factors: Any) -> list[Tensor]:
        """``tr(P^-1 dP)`` as one gradient for each tensor of P, expanded to the batch."""
