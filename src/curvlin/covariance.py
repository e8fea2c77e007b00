"""Covariances: the inverse of a precision operator, a structured operator, or a matrix of any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import symmetric
from curvlin._random import standard_normal
from curvlin._tables import CONGRUENCE, lookup
from curvlin._tree import Tree, needs_grad, static_field, tensor_field
from curvlin.algebra.inverses import inverse_operator
from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.features.base import FeatureOperator, same_features
from curvlin.index import Index
from curvlin.numerics.implicit import graft
from curvlin.precision.base import PrecisionOperator, exact_operator
from curvlin.precision.dense import Dense

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

    from curvlin.interop.linear_operator import CurvlinLinearOperator


@dataclass(eq=False, repr=False, init=False)
class Covariance(Tree):
    """``C = P^-1`` as an object: its product is a solve with P, its solve a product; nothing is inverted.

    `Covariance.of(C)` holds C itself, a structured operator (a Kronecker kernel matrix with noise, for one) or a
    matrix.

    Args:
        operator: P, the precision.
        inverted: static; False if `operator` is C itself. Use `Covariance.of` for that.

    Raises:
        TypeError: if `operator` is not a precision operator.
    """

    operator: PrecisionOperator = tensor_field(0)
    inverted: bool = static_field()

    def __init__(self, operator: PrecisionOperator, inverted: bool = True) -> None:
        self.operator = exact_operator("operator", operator, "for a matrix use Covariance.of(matrix)")
        self.inverted = inverted

    @classmethod
    def of(cls, matrix: Float[Tensor, "*batch D D"] | PrecisionOperator) -> Covariance:
        """The covariance with these entries.

        A structured operator keeps its structure: every product, solve, determinant and draw is the operator's,
        and it has to be positive definite where it is solved or drawn from.

        A tensor, or a `Dense`, may be singular. Its rank is decided in the scale of correlations: an eigenvalue
        within ``D eps`` of the largest is zero, with eps that of the dtype in which the entries were given.
        ``solve``, ``logdet``, ``inv_quad`` and ``inverse`` of a singular one raise.

        Args:
            matrix: ``(*batch, D, D)``, symmetric to rounding, or an operator whose entries are meant.

        Raises:
            TypeError, ValueError: if it is neither an operator nor a finite symmetric floating matrix.
        """
        if isinstance(matrix, PrecisionOperator):
            return cls(matrix, inverted=False)
        return cls(Dense(symmetric("matrix", matrix)), inverted=False)

    # -- shape -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """D, the number of rows."""
        return self.operator.size

    @property
    def shape(self) -> torch.Size:
        """``(*batch_shape, D, D)``."""
        return self.operator.shape

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        kind = f"{type(self.operator).__name__}{'^-1' if self.inverted else ''}"
        return f"Covariance({shape}, {kind}, dtype={self.dtype}, device={self.device})"

    # -- products, solves, determinants ----------------------------------------------------------------------

    def __matmul__(self, X: Float[Tensor, "... D *K"]) -> Float[Tensor, "... D *K"]:
        """``C X``: a 1-D tensor is a vector, anything else is ``(..., D, K)``."""
        return self.operator.solve(X) if self.inverted else self.operator @ X

    def __rmatmul__(self, X: Float[Tensor, "... K D"]) -> Float[Tensor, "... K D"]:
        """``X C`` for a tensor X, by symmetry ``(C X^T)^T``."""
        if not isinstance(X, Tensor):
            return NotImplemented
        return self @ X if X.ndim == 1 else (self @ X.mT).mT

    def solve(self, X: Float[Tensor, "... D *K"]) -> Float[Tensor, "... D *K"]:
        """``C^-1 X``.

        Raises:
            NotPositiveDefiniteError: if C is singular.
        """
        return self.operator @ X if self.inverted else self._regular().solve(X)

    def logdet(self) -> Float[Tensor, "*batch"]:
        """``log det C``.

        Raises:
            NotPositiveDefiniteError: if C, or the precision that it inverts, is singular.
        """
        return -self.operator.logdet() if self.inverted else self._regular().logdet()

    def quad(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "*batch"]:
        """``x^T C x``, the variance of ``x^T y`` for y of covariance C; leading dimensions of x are batch."""
        if self.inverted:
            return self.operator.inv_quad(x)
        X, restore = self.operator._vectors("x", x)
        C = self.operator.to(torch.float64)
        return restore((X * C._matmul(X)).sum(-2, keepdim=True)).squeeze(-1).to(self.dtype)

    def inv_quad(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "*batch"]:
        """``x^T C^-1 x``, the squared Mahalanobis length of x; leading dimensions of x are batch.

        Raises:
            NotPositiveDefiniteError: if C is singular.
        """
        if not self.inverted:
            return self._regular().inv_quad(x)
        return self._inv_quad_and_logdet(x)[0].to(self.dtype)

    def _inv_quad_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x^T C^-1 x`` and ``log det C`` in float64, from one factorisation."""
        if not self.inverted:
            self.operator._check_right_hand_side("x", x)  # before x takes the dtype of the factors
            C, factors = self._regular()._factored()
            X, restore = C._vectors("x", x.double())
            return restore(C._inv_quad(X, factors).unsqueeze(-2)).squeeze(-1), C._logdet(factors)
        X, restore = self.operator._vectors("x", x)
        P, factors = self.operator._factored()
        quad = precision_quad(P, factors, X)
        return restore(quad.unsqueeze(-2)).squeeze(-1), -P._logdet(factors)

    def diagonal(self) -> Float[Tensor, "*batch D"]:
        """The variances."""
        return self.operator.inverse_diagonal() if self.inverted else self.operator.diagonal()

    def to_dense(self) -> Float[Tensor, "*batch D D"]:
        """The matrix itself, with all its ``D^2`` entries."""
        if not self.inverted:
            return self.operator.to_dense()
        dense = self.operator.solve(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return ((dense + dense.mT) / 2).expand(self.shape)

    def inverse(self) -> PrecisionOperator:
        """The precision: the operator that this inverts, or one with the entries of ``C^-1``.

        That of ``Z + U U^T`` is a difference, whose solves, determinant and derivatives by U are good to rounding times
        the largest eigenvalue of ``U^T Z^-1 U``; with at least D columns it is a `Dense`, good to its own condition.
        Solves and determinants of C itself lose nothing.

        Raises:
            NotPositiveDefiniteError: if C is singular.
            NotClosedError: if C is an operator whose inverse has no structure of ours.
        """
        return self.operator if self.inverted else inverse_operator(self._regular())

    def _entries(self) -> PrecisionOperator:
        """The operator whose entries are those of C.

        Raises:
            NotClosedError: if C is the inverse of an operator and has no structure of ours.
        """
        return inverse_operator(self.operator) if self.inverted else self.operator

    def congruence(self, Phi: Tensor | FeatureOperator, *, joint: bool = False) -> Tensor:
        """``Phi C Phi^T``, with the shapes of `PrecisionOperator.inv_congruence`.

        Unlike there, features of a lower precision are contracted in float64, so that the entries are right
        to their last digit and a rank can be told from them.

        Raises:
            TypeError, ValueError: if Phi is of another dtype, device or size.
            NotClosedError: if the kinds of features and operator have no exact structured rule.
        """
        if isinstance(Phi, Tensor):
            rows = self.operator._rows("Phi", Phi)
            if self.inverted:
                return self.operator.inv_congruence(rows)
            product = rows.double() @ self.operator.to(torch.float64)._matmul(rows.double().mT)
            return _symmetrised(product).to(self.dtype)
        if not self.inverted:
            return self._matrix_congruence(Phi, joint).to(self.dtype)
        rule = lookup(CONGRUENCE, type(Phi), type(self.operator))
        if rule is None or self.dtype == torch.float64:
            return self.operator.inv_congruence(Phi, joint=joint)  # which checks, and refuses by name
        same_features("Phi", Phi, self.size, next(self._tensors())[0], self.batch_shape)
        P, factors = self.operator._factored()
        K: Tensor = rule(Phi.to(torch.float64), None, P, factors, "joint" if joint else "per_sample", None)
        return K.to(self.dtype)

    def _matrix_congruence(self, Phi: FeatureOperator, joint: bool) -> Tensor:
        same_features("Phi", Phi, self.size, next(self._tensors())[0], self.batch_shape)
        Phi = Phi.to(torch.float64)
        C = self.operator.to(torch.float64)
        if not isinstance(C, Dense):
            return _operator_congruence(Phi, C, joint)
        products, rows = Phi._matmul(C.to_dense()), Phi.to_dense()
        if not joint:
            return _symmetrised(products @ rows.mT)
        K = _symmetrised(products.flatten(-3, -2) @ rows.flatten(-3, -2).mT)
        return K.reshape(*K.shape[:-2], *rows.shape[-3:-1], *rows.shape[-3:-1])

    # -- samples ---------------------------------------------------------------------------------------------

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Float[Tensor, "*sample *batch D"]:
        """Draws of N(0, C), reparametrised.

        Args:
            sample_shape: leading shape of the draws.
            generator: source of randomness; None is torch's default generator.

        Raises:
            NotPositiveDefiniteError: if C has a negative eigenvalue.
            NotClosedError: if C is a singular matrix that needs a gradient; draws have none in it.
        """
        return self.colour(
            standard_normal(sample_shape, self.shape[:-1], generator, next(self._tensors())[0])
        )

    def colour(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """``F z`` with ``F F^T = C``: turns standard normal noise into a draw of N(0, C)."""
        if self.inverted:
            return self.operator.unwhiten(z)
        if not self._is_concrete() or self._is_regular():
            return self.operator.root_matvec(z)
        if self._needs_grad():
            raise NotClosedError(
                "a draw of a singular covariance has no derivative in its entries; draw from the "
                "distribution that the covariance came from and map the draws, or draw without gradient"
            )
        X, restore = self.operator._vectors("z", z)
        return restore(self._semidefinite_root() @ X).to(self.dtype)

    # -- rank of a matrix ------------------------------------------------------------------------------------

    def _is_regular(self) -> bool:
        """Whether every eigenvalue of the correlations exceeds rounding.

        Structured operators say so themselves, where they are factorised.

        Raises:
            NotPositiveDefiniteError: if one is negative beyond rounding.
        """
        if not isinstance(self.operator, Dense):
            return True
        K, _ = self._correlations()
        eye = torch.eye(self.size, dtype=K.dtype, device=K.device)
        # The Frobenius norm bounds the largest eigenvalue: a Cholesky factor is proof at a tenth of the cost.
        margin = self.size * self.operator.resolution * torch.linalg.matrix_norm(K)
        if bool((torch.linalg.cholesky_ex(K - margin[..., None, None] * eye).info == 0).all()):
            return True
        spectrum = torch.linalg.eigvalsh(K)
        tolerance = self._tolerance(spectrum)
        if bool((spectrum[..., 0] < -tolerance).any()):
            raise self._failure()
        return bool((spectrum[..., 0] > tolerance).all())

    def _regular(self) -> PrecisionOperator:
        """C itself, known to be positive definite (not asked inside transforms, where values are unknown)."""
        if self._is_concrete() and not self._is_regular():
            raise self._failure()
        return self.operator

    def _failure(self) -> NotPositiveDefiniteError:
        spectrum = torch.linalg.eigvalsh(self._matrix64())
        largest, smallest = float(spectrum.abs().max()), float(spectrum[..., 0].min())
        damping = (
            100 * self.size * self.operator.resolution + max(0.0, -2 * smallest / largest)
            if largest > 0
            else None
        )
        return NotPositiveDefiniteError("Covariance", smallest, damping)

    def _semidefinite_root(self) -> Tensor:
        """``F = S V diag(sqrt(lambda))`` with ``C = S V diag(lambda) V^T S``, rounding in lambda set to 0."""
        K, spread = self._correlations()
        spectrum, V = torch.linalg.eigh(K)
        kept = torch.where(spectrum > self._tolerance(spectrum)[..., None], spectrum, 0.0)
        root: Tensor = spread[..., None] * V * kept.sqrt()[..., None, :]
        return root

    def _tolerance(self, spectrum: Tensor) -> Tensor:
        tolerance: Tensor = self.size * self.operator.resolution * spectrum[..., -1].clamp(min=0.0)
        return tolerance

    def _correlations(self) -> tuple[Tensor, Tensor]:
        """``K = S^-1 C S^-1`` and S, the standard deviations (the largest of them in the place of a zero)."""
        matrix = self._matrix64()
        variances = matrix.diagonal(dim1=-2, dim2=-1)
        largest = variances.amax(-1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        spread = torch.where(variances > 0, variances, largest).sqrt()
        return matrix / spread[..., :, None] / spread[..., None, :], spread

    def _matrix64(self) -> Tensor:
        matrix: Tensor = self.operator.to_dense().detach().double()
        return matrix

    # -- parts and ways out ----------------------------------------------------------------------------------

    def marginal(self, index: Index, *, max_size: int = 2048) -> Covariance:
        """The covariance of the coordinates `index`, in that order."""
        if self.inverted:
            return Covariance(self.operator.marginal(index, max_size=max_size))
        return Covariance(self.operator.conditional(index, max_size=max_size), inverted=False)

    def to_scipy(self) -> ScipyLinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` whose product is ``C @ x`` (no batch, CPU)."""
        from curvlin.interop.scipy import to_scipy

        return to_scipy(self)

    def to_linear_operator(self, as_: Literal["covariance", "precision"]) -> CurvlinLinearOperator:
        """A `linear_operator.LinearOperator` of C ("covariance") or of ``C^-1`` ("precision").

        See `PrecisionOperator.to_linear_operator`.
        """
        from curvlin.interop.linear_operator import to_linear_operator

        return to_linear_operator(self, as_)


def _operator_congruence(Phi: FeatureOperator, C: PrecisionOperator, joint: bool) -> Tensor:
    """``Phi C Phi^T`` from products with C, as many rows at a time as take the memory of C."""
    width = max(1, sum(t.numel() for t, _ in C._tensors()) // (C.size * Phi.n_rows))
    products = []
    for n in range(0, Phi.n_samples, width):
        rows = Phi[n : n + width].to_dense()
        product = C._matmul(rows.flatten(-3, -2).mT)  # (..., D, n R)
        if joint:
            K = Phi._matmul(product)  # (..., N, R, n R)
            products.append(K.unflatten(-1, rows.shape[-3:-1]))
        else:
            products.append(rows @ product.mT.reshape(*product.shape[:-2], *rows.shape[-3:]).mT)
    if not joint:
        return _symmetrised(torch.cat(products, dim=-3))
    K = torch.cat(products, dim=-2)
    return (K + K.movedim((-4, -3), (-2, -1))) / 2


def _symmetrised(K: Tensor) -> Tensor:
    return (K + K.mT) / 2


def precision_quad(P: PrecisionOperator, factors: Any, X: Tensor) -> Tensor:
    """``x^T P x`` of each column of X, by hooks: ``(..., D, K) -> (..., K)``."""
    # With R R^T = P the square of R^T x loses digits with the root of P's condition, x^T P x with all of it;
    # but the derivatives of the product are plain, and those of a root need not exist.
    with torch.no_grad():
        value = P.detach()._whiten(X.detach(), factors).square().sum(-2)
    if not (P._needs_grad() or needs_grad(X)):
        return value
    return graft(value, (X * P._matmul(X)).sum(-2))
