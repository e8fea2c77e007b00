"""Operators and covariances as `linear_operator.LinearOperator`, for gpytorch and BoTorch: exact, or refused."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator, RootLinearOperator, ZeroLinearOperator
from torch import Tensor

from curvlin._random import standard_normal
from curvlin._tree import Structure, build, is_concrete
from curvlin.covariance import Covariance
from curvlin.errors import InexactPathError
from curvlin.interop.fail_closed import FailClosed, refused
from curvlin.interop.indexing import coordinates, entries_at, is_principal, rectangle
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.spectral import SpectralKronecker

Meaning = Literal["precision", "covariance"]

MAX_DENSE = 2048
"""Rows up to which an adapter becomes a dense matrix, because `linear_operator` asks for one unasked."""


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


def flipped(C: Covariance) -> Covariance:
    """The matrix ``C^-1``, held by the same operator."""
    return Covariance(C.operator, inverted=not C.inverted)


class _Adapter(FailClosed):
    """What the matrix and its root have in common: the tensors, each with the whole batch, and how to read them.

    Args:
        *tensors: of the `Covariance` that is stood for, in pytree order.
        spec: what is left of it without them.
    """

    def __init__(self, *tensors: Tensor, spec: Structure) -> None:
        super().__init__(*tensors, spec=spec)
        self._spec = spec

    def _whole(self) -> Covariance:
        result: Covariance = build(self._spec, self._args)
        return result

    @property
    def covariance(self) -> Covariance:
        """The matrix as a `Covariance` on the tensors held here; a batch that only repeats it is left out."""
        whole = self._whole()
        repeated = min(_repeated(t, t.ndim - own) for t, own in whole._tensors())
        return whole._map(lambda t, _: t[(0,) * repeated]) if repeated else whole

    def _rebuilt(self, C: Covariance) -> Any:
        return type(self).of(C)

    @classmethod
    def of(cls, C: Covariance) -> Any:
        """The adapter of a covariance."""
        batch = C.batch_shape
        tensors = [
            # A tensor that has the batch already stays the one it is, so that `requires_grad_` reaches it.
            t if t.shape[: t.ndim - own] == batch else t.expand(*batch, *t.shape[t.ndim - own :])
            for t, own in C._tensors()
        ]
        return cls(*tensors, spec=C._structure())

    def _size(self) -> torch.Size:
        return self._whole().shape

    def evaluate_kernel(self) -> Any:
        """Itself: nothing is lazy here."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `Tensor.to`, with what `PrecisionOperator.to` checks."""
        return self._rebuilt(self._whole().to(*args, **kwargs))

    def type(self, dtype: torch.dtype) -> Any:
        """As `to`."""
        return self.to(dtype=dtype)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> Any:
        return self._rebuilt(self._whole().expand(torch.Size(batch_shape)))

    def repeat(self, *sizes: Any) -> Any:
        """Copies along batch dimensions, as views wherever one operator is repeated."""
        counts = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if len(counts) < self.dim() or tuple(counts[-2:]) != (1, 1):
            raise ValueError(
                f"sizes must be one count for each of {self.dim()} dimensions and end in (1, 1), found {counts}"
            )
        batch = (1,) * (len(counts) - self.dim()) + tuple(self.batch_shape)

        def repeated(t: Tensor, own: int) -> Tensor:
            t = t.reshape(*batch, *t.shape[t.ndim - own :])
            if all(1 in pair for pair in zip(batch, counts[:-2], strict=True)):
                return t.expand(
                    *(b * c for b, c in zip(batch, counts[:-2], strict=True)), *t.shape[len(batch) :]
                )
            return t.repeat(*counts[:-2], *(1,) * own)

        return self._rebuilt(self._whole()._map(repeated))

    def matmul(self, other: Tensor) -> Tensor:
        """The product with a tensor; 1-D is a vector."""
        if not isinstance(other, Tensor):
            raise refused(type(self), f"matmul with a {type(other).__name__}")
        if other.ndim == 1:
            product: Tensor = self._matmul(other.unsqueeze(-1)).squeeze(-1)
            return product
        return self._matmul(other)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self._transpose_nonbatch().matmul(rhs)
        return product

    def to_dense(self, max_size: int = MAX_DENSE) -> Tensor:
        """The matrix.

        Args:
            max_size: the most rows for which it is made, because much of `linear_operator` calls this unasked.

        Raises:
            InexactPathError: if there are more.
        """
        size = self.shape[-1]
        if size > max_size:
            raise InexactPathError(
                f"{type(self).__name__}.to_dense of {size} rows exceeds max_size={max_size}; use to_dense(max_size) "
                "or covariance.to_dense() if that is meant"
            )
        return self._dense()

    def _broadcast(self, value: Tensor, own: int) -> Tensor:
        """A result with the whole batch, repeated dimensions included."""
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[: value.ndim - own])
        return value.expand(*batch, *value.shape[value.ndim - own :])


class CurvlinLinearOperator(_Adapter):
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
            return other
        if not isinstance(other, (Real, Tensor)):
            raise refused(type(self), f"mul (entry by entry) with a {type(other).__name__}")
        if isinstance(other, Tensor) and other.numel() > 1 and other.shape[-2:] != (1, 1):
            raise refused(type(self), f"mul (entry by entry) with a tensor of shape {tuple(other.shape)}")
        if isinstance(other, Tensor):
            other = other.reshape(()) if other.numel() == 1 else other[..., 0, 0]
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

        if isinstance(other, ZeroLinearOperator) or (isinstance(other, (int, float)) and other == 0):
            return self
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


class RootFactor(_Adapter):
    """F with ``F F^T = A``, or its transpose; square, and not triangular.

    Args:
        *tensors: as of the adapter of A.
        spec: likewise.
        transposed: whether it stands for ``F^T``.
    """

    def __init__(self, *tensors: Tensor, spec: Structure, transposed: bool) -> None:
        LinearOperator.__init__(self, *tensors, spec=spec, transposed=transposed)
        self._spec, self._transposed = spec, transposed

    def _rebuilt(self, C: Covariance) -> RootFactor:
        plain = CurvlinLinearOperator.of(C)
        return RootFactor(*plain._args, spec=plain._spec, transposed=self._transposed)

    def _matmul(self, rhs: Tensor) -> Tensor:
        C = self.covariance
        apply: Callable[[Tensor], Tensor] = C.colour
        if self._transposed:  # the transpose of R^-T is R^-1, and that of R is R^T
            apply = C.operator.root_solve if C.inverted else C.operator.whiten
        rhs = rhs.expand(*torch.broadcast_shapes(C.batch_shape, rhs.shape[:-2]), *rhs.shape[-2:])
        return self._broadcast(apply(rhs.movedim(-1, 0)).movedim(0, -1), 2)

    def _transpose_nonbatch(self) -> RootFactor:
        return RootFactor(*self._args, spec=self._spec, transposed=not self._transposed)

    def squared(self) -> Covariance:
        """A, whose root this is.

        Raises:
            InexactPathError: for the transpose, ``F^T F`` being another matrix.
        """
        if self._transposed:
            raise refused(type(self), "squared of a transpose")
        return self._whole()

    def inverse(self) -> RootFactor:
        """``F^-1``: the transpose of the root of ``A^-1``."""
        inverse = flipped(self._whole())
        return RootFactor(*self._args, spec=inverse._structure(), transposed=not self._transposed)

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        return self._matmul(eye)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        rows, columns = (coordinates(i, self.shape[-1], self.device) for i in (row_index, col_index))
        if rows is not None or columns is not None:
            raise refused(type(self), "[...] of rows or columns")
        return RootFactor(
            *(t[batch_indices] for t in self._args), spec=self._spec, transposed=self._transposed
        )


def _repeated(t: Tensor, n_batch: int) -> int:
    """How many leading batch dimensions hold one element, or views of one."""
    count = 0
    while count < n_batch and (t.shape[count] == 1 or (t.stride(count) == 0 and t.shape[count] > 0)):
        count += 1
    return count


def _has_symmetric_root(P: PrecisionOperator) -> bool:
    """Whether the R that P chose, ``R R^T = P``, is the symmetric one."""
    if isinstance(P, BlockDiag):
        return all(_has_symmetric_root(block) for block in P.blocks)
    if isinstance(P, KroneckerSum):
        return P.orthogonal
    if isinstance(P, Woodbury):
        return isinstance(P.base, Isotropic) and P.core is None
    return isinstance(P, (Isotropic, Diagonal, SpectralKronecker))
