"""Operators and covariances as `linear_operator.LinearOperator`, for gpytorch and BoTorch: exact, or refused."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator, ZeroLinearOperator
from torch import Tensor

from curvlin._random import standard_normal
from curvlin._tree import is_concrete
from curvlin.covariance import Covariance
from curvlin.errors import InexactPathError
from curvlin.interop.adapter import Adapter, flipped
from curvlin.interop.fail_closed import refused
from curvlin.interop.indexing import entries_at, is_principal, rectangle
from curvlin.interop.root_factor import RootFactor
from curvlin.interop.subscripts import coordinates
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.spectral import SpectralKronecker

Meaning = Literal["precision", "covariance"]


def to_linear_operator(operator: PrecisionOperator | Covariance, as_: Meaning) -> CurvlinLinearOperator:
    """`operator`, or its inverse, as a `LinearOperator`.

    Args:
        operator: a precision or a covariance.
        as_: the matrix that the result stands for.

    Raises:
        ValueError: if `as_` is neither "precision" nor "covariance".
    """
    if as_ not in ("precision", "covariance"):
        raise ValueError(f'as_ must be "precision" or "covariance", found {as_!r}')
    covariance = operator if isinstance(operator, Covariance) else Covariance(operator)
    return CurvlinLinearOperator.of(covariance if as_ == "covariance" else flipped(covariance))


class CurvlinLinearOperator(Adapter):
    """A `LinearOperator` whose every operation is exact at every size, or raises `InexactPathError`.

    Made by `PrecisionOperator.to_linear_operator` and `Covariance.to_linear_operator`. It stands for a matrix; all of
    its methods are derived from `covariance`, and its operations are differentiable twice, unlike those of its base
    class. Nothing is cached.
    """

    # -- products --------------------------------------------------------------------------------------------

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._broadcast(self.covariance @ rhs, 2) if rhs.ndim > 1 else self.matmul(rhs)

    def _transpose_nonbatch(self) -> CurvlinLinearOperator:
        return self

    def _dense(self) -> Tensor:
        return self.covariance.to_dense().expand(self.shape)

    def _diagonal(self) -> Tensor:
        return self.covariance.diagonal().expand(self.shape[:-1])

    def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
        """The main diagonal of the matrix; any other is refused."""
        if offset != 0 or {dim1 % self.dim(), dim2 % self.dim()} != {self.dim() - 2, self.dim() - 1}:
            raise refused(type(self), f"diagonal(offset={offset}, dim1={dim1}, dim2={dim2})")
        return self._diagonal()

    # -- solves, determinants, quadratic forms ---------------------------------------------------------------

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """``A^-1 right``, or ``left A^-1 right``; a 1-D right-hand side is a vector, any other ``(..., D, K)``."""
        solution = self._broadcast(self.covariance.solve(right_tensor), min(right_tensor.ndim, 2))
        return solution if left_tensor is None else left_tensor @ solution

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Tensor:
        if num_tridiag:
            raise refused(type(self), "_solve with num_tridiag")
        return self.solve(rhs)

    def logdet(self) -> Tensor:
        """``log det A``."""
        return self.covariance.logdet().expand(self.batch_shape)

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """``x^T A^-1 x``, summed over the columns of the right-hand side or for each of them."""
        return self.inv_quad_logdet(inv_quad_rhs, logdet=False, reduce_inv_quad=reduce_inv_quad)[0]

    def inv_quad_logdet(
        self,
        inv_quad_rhs: Tensor | None = None,
        logdet: bool | None = False,
        reduce_inv_quad: bool | None = True,
    ) -> tuple[Tensor, Tensor]:
        """Both from one factorisation; a 0-dimensional zero stands for what was not asked for."""
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        if inv_quad_rhs is None:
            return nothing, self.logdet() if logdet else nothing
        was_vector = inv_quad_rhs.ndim == 1
        columns = inv_quad_rhs.unsqueeze(-1) if was_vector else inv_quad_rhs
        columns = columns.expand(
            *torch.broadcast_shapes(self.batch_shape, columns.shape[:-2]), *columns.shape[-2:]
        )
        quad, log_det = self.covariance._inv_quad_and_logdet(columns.movedim(-1, 0))
        quad = (quad.sum(0) if reduce_inv_quad else quad.movedim(0, -1)).to(self.dtype)
        if was_vector and not reduce_inv_quad:
            quad = quad.squeeze(-1)
        return quad, log_det.to(self.dtype).expand(self.batch_shape) if logdet else nothing

    def inverse(self) -> CurvlinLinearOperator:
        """``A^-1``, held by the same tensors."""
        inverse: CurvlinLinearOperator = CurvlinLinearOperator.of(flipped(self._whole()))
        return inverse

    # -- roots and samples -----------------------------------------------------------------------------------

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """R with ``R R^T = A``, full and exact; `method` makes no difference."""
        return RootLinearOperator(RootFactor(*self._args, spec=self._spec, transposed=False))

    def root_inv_decomposition(
        self,
        initial_vectors: Tensor | None = None,
        test_vectors: Tensor | None = None,
        method: str | None = None,
    ) -> RootLinearOperator:
        """R with ``R R^T = A^-1``, full and exact; the arguments make no difference."""
        return self.inverse().root_decomposition()

    def zero_mean_mvn_samples(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of N(0, A), ``(num_samples, *batch, D)``."""
        return self.covariance.colour(
            standard_normal((num_samples,), self.shape[:-1], generator, self._args[0])
        )

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``A^{-1/2} rhs`` with the symmetric root, where that is the root that the operator has.

        With `lhs`, ``lhs A^{-1/2} rhs`` and the diagonal of ``lhs A^-1 lhs^T``.

        Raises:
            InexactPathError: where the operator's root is not the symmetric one.
        """
        C = self.covariance
        if not _has_symmetric_root(C.operator):
            raise InexactPathError(
                f"sqrt_inv_matmul needs the symmetric root, and that of a {type(C.operator).__name__} is another; use "
                "root_inv_decomposition().root, or whiten and unwhiten of the operator"
            )
        root = RootFactor(*self._args, spec=self._spec, transposed=False).inverse()
        result: Tensor = root.matmul(rhs)
        if lhs is None:
            return result
        quad = self.inv_quad(lhs.mT, reduce_inv_quad=False)
        return lhs @ result, quad

    # -- parts -----------------------------------------------------------------------------------------------

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        picked = self
        if batch_indices:
            picked = type(self)(*(t[batch_indices] for t in self._args), spec=self._spec)
        rows, columns = (coordinates(i, self.shape[-1], self.device) for i in (row_index, col_index))
        if rows is None and columns is None:
            return picked
        if rows is not None and is_principal(rows, columns):
            part = picked.covariance.marginal(rows)
            return CurvlinLinearOperator.of(part)._expand_batch(picked.batch_shape)
        return rectangle(picked, rows, columns)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        return entries_at(self, row_index, col_index, batch_indices)

    # -- sums and multiples ----------------------------------------------------------------------------------

    def mul(self, other: Any) -> CurvlinLinearOperator:
        """A multiple by a positive number, or by one for each element of the batch ``(..., 1, 1)``."""
        if isinstance(other, ZeroLinearOperator):
            return other.expand(torch.broadcast_shapes(self.shape, other.shape))
        if not isinstance(other, (Real, Tensor)):
            raise refused(type(self), f"mul (entry by entry) with a {type(other).__name__}")
        per_element = isinstance(other, Tensor) and (other.numel() == 1 or other.shape[-2:] == (1, 1))
        if isinstance(other, Tensor) and not per_element:
            raise refused(type(self), f"mul (entry by entry) with a tensor of shape {tuple(other.shape)}")
        if isinstance(other, Tensor):
            other = other[..., 0, 0] if other.ndim >= 2 else other.reshape(())
        return self._mul_constant(other)

    def _mul_constant(self, other: float | Tensor) -> CurvlinLinearOperator:
        C, c = self.covariance, torch.as_tensor(other, dtype=self.dtype, device=self.device)
        if is_concrete(c) and not bool((c > 0).all()):
            raise ValueError(
                f"the scale of an operator must be positive, found {float(c.detach().min()):.3e}"
            )
        scaled = Covariance(C.operator / c if C.inverted else C.operator * c, inverted=C.inverted)
        batch = torch.broadcast_shapes(self.batch_shape, c.shape)
        result: CurvlinLinearOperator = CurvlinLinearOperator.of(scaled)._expand_batch(batch)
        return result

    def __add__(self, other: Any) -> CurvlinLinearOperator:
        from curvlin.interop.ingestion import operator_of_sum

        if isinstance(other, (int, float)) and other == 0:
            return self
        if isinstance(other, ZeroLinearOperator):
            return self._expand_batch(torch.broadcast_shapes(self.shape, other.shape)[:-2])
        if not isinstance(other, (Tensor, LinearOperator)):
            raise refused(type(self), f"+ with a {type(other).__name__}")
        total = Covariance.of(operator_of_sum([self, other]))
        batch = torch.broadcast_shapes(self.batch_shape, other.shape[:-2])
        return CurvlinLinearOperator.of(total)._expand_batch(batch)

    def add_diagonal(self, diag: Tensor) -> CurvlinLinearOperator:
        """``A + diag(d)``; a number, one per element of the batch ``(..., 1)``, or one per coordinate."""
        size = self.shape[-1]
        constant = diag.ndim == 0 or (diag.shape[-1] == 1 and size > 1)
        value = diag if diag.ndim == 0 else diag[..., 0]
        added = Isotropic(value, size) if constant else Diagonal(diag)
        return self + CurvlinLinearOperator.of(Covariance.of(added))

    def add_low_rank(self, low_rank_mat: Tensor, *args: Any, **kwargs: Any) -> CurvlinLinearOperator:
        """``A + B B^T``; what is asked about roots makes no difference."""
        updated = self.covariance._entries().update(low_rank_mat)
        return CurvlinLinearOperator.of(Covariance.of(updated))


def _has_symmetric_root(P: PrecisionOperator) -> bool:
    """Whether the R that P chose, ``R R^T = P``, is the symmetric one."""
    if isinstance(P, BlockDiag):
        return all(_has_symmetric_root(block) for block in P.blocks)
    if isinstance(P, KroneckerSum):
        return P.orthogonal
    if isinstance(P, Woodbury):
        return isinstance(P.base, Isotropic) and P.core is None
    return isinstance(P, (Isotropic, Diagonal, SpectralKronecker))
