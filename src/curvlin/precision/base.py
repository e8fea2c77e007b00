"""The contract of a precision operator: a symmetric positive (semi)definite matrix that keeps its structure.

Public methods check their arguments, move the work to float64, and call one hook each; a hook sees a float64
operator, right-hand sides of shape ``(..., D, K)``, and the factors made by `_factorize`. All hooks are abstract:
an operator cannot be incomplete, and nothing falls back to an approximation.

With ``R R^T = P`` for the root R that the operator chose (any smooth one; not unique):

    solve      P^-1 X          logdet      log det P        inv_quad     x^T P^-1 x
    root_solve R^-1 g          root_matvec R z              whiten       R^T x        unwhiten   R^-T z
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating, positive_integer, same_kind
from curvlin._random import standard_normal
from curvlin._tables import ADD, CONGRUENCE, TRACE_SOLVE, lookup
from curvlin._tree import Tree, is_concrete
from curvlin.errors import NotClosedError
from curvlin.index import Index, as_index, identity_columns
from curvlin.numerics.chunks import joined, pieces
from curvlin.numerics.implicit import factorize
from curvlin.precision.kept import Kept

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

    from curvlin.covariance import Covariance
    from curvlin.features.base import FeatureOperator
    from curvlin.interop.linear_operator import CurvlinLinearOperator

OperatorT = TypeVar("OperatorT", bound="PrecisionOperator")


class PrecisionOperator(Tree, ABC):
    """A symmetric positive (semi)definite ``D x D`` matrix (or a batch of them) that is never multiplied out.

    Immutable, a pytree, natively batched. A singular operator may be built, multiplied, summed and scaled; what
    needs an inverse or a determinant raises `NotPositiveDefiniteError`. Results keep the operator's dtype;
    factorisations run in float64.
    """

    # -- shape ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def size(self) -> int:
        """D, the number of rows."""

    @property
    def shape(self) -> torch.Size:
        """``(*batch_shape, D, D)``."""
        return torch.Size([*self.batch_shape, self.size, self.size])

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{type(self).__name__}({shape}, dtype={self.dtype}, device={self.device})"

    # -- products and inverses --------------------------------------------------------------------------------

    def __matmul__(self, X: Float[Tensor, "... D *K"]) -> Float[Tensor, "... D *K"]:
        """``P @ X``: a 1-D tensor is a vector, anything else is ``(..., D, K)``."""
        X, was_vector = self._columns("X", X)
        product = self._matmul(X)
        return product.squeeze(-1) if was_vector else product

    def __rmatmul__(self, X: Float[Tensor, "... K D"]) -> Float[Tensor, "... K D"]:
        """``X @ P`` for a tensor X, by symmetry ``(P @ X^T)^T``."""
        if not isinstance(X, Tensor):
            return NotImplemented
        return self @ X if X.ndim == 1 else (self @ X.mT).mT

    def solve(self, X: Float[Tensor, "... D *K"]) -> Float[Tensor, "... D *K"]:
        """``P^-1 X``; a 1-D tensor is a vector, anything else is ``(..., D, K)``.

        Raises:
            NotPositiveDefiniteError: if P is singular or indefinite.
        """
        X, was_vector = self._columns("X", X)
        P, factors = self._factored()
        solution = P._solve(X.double(), factors).to(self.dtype)
        return solution.squeeze(-1) if was_vector else solution

    def logdet(self) -> Float[Tensor, "*batch"]:
        """``log det P``, summed in float64.

        Raises:
            NotPositiveDefiniteError: if P is singular or indefinite.
        """
        P, factors = self._factored()
        return P._logdet(factors).to(self.dtype).expand(self.batch_shape)

    def inv_quad(self, x: Float[Tensor, "... D"]) -> Float[Tensor, ...]:
        """``x^T P^-1 x`` as a sum of squares, hence never negative; leading dimensions of x are batch."""
        X, restore = self._vectors("x", x)
        P, factors = self._factored()
        return restore(P._inv_quad(X, factors).unsqueeze(-2)).squeeze(-1).to(self.dtype)

    def inv_congruence(
        self,
        Phi: Tensor | FeatureOperator,
        Psi: Tensor | FeatureOperator | None = None,
        *,
        joint: bool = False,
        chunk: int | None = None,
    ) -> Tensor:
        """``Phi P^-1 Psi^T`` (``Psi = Phi`` when it is not given).

        Args:
            Phi: a tensor of rows ``(..., R, D)``, or a feature operator ``(N, R, D)``.
            Psi: likewise, for a cross covariance.
            joint: for one feature operator, couple all samples with each other instead of each with itself.
            chunk: samples handled at a time, to bound memory; chosen from the shapes when None.

        Returns:
            ``(..., R, R')`` for tensors; ``(N, R, R)`` per sample for a feature operator;
            ``(N, R, M, R')`` joint or cross.

        Raises:
            NotPositiveDefiniteError: if P is singular or indefinite.
            NotClosedError: if the kinds of features and operator have no exact structured rule.
        """
        return self._congruence(Phi, Psi, "joint" if joint or Psi is not None else "per_sample", chunk)

    def inv_congruence_diagonal(
        self, Phi: Tensor | FeatureOperator, *, chunk: int | None = None
    ) -> Float[Tensor, "... R"]:
        """The diagonal of ``Phi P^-1 Phi^T`` without the rest of it: ``(..., R)``, or ``(N, R)`` for features."""
        return self._congruence(Phi, None, "diagonal", chunk)

    def _congruence(self, Phi: Any, Psi: Any, layout: str, chunk: int | None) -> Tensor:
        if chunk is not None:
            positive_integer("chunk", chunk)
        if isinstance(Phi, Tensor):
            if Psi is not None and not isinstance(Psi, Tensor):
                raise TypeError(
                    f"Psi must be a tensor like Phi, found {type(Psi).__name__}; wrap Phi in DenseFeatures"
                )
            return self._tensor_congruence(Phi, Psi, layout)
        batch = self.batch_shape
        for name, value in (("Phi", Phi), ("Psi", Psi)):
            if value is None and name == "Psi":
                continue
            if isinstance(value, Tensor) or not hasattr(value, "gram"):
                raise TypeError(
                    f"{name} must be a FeatureOperator (or both tensors), found {type(value).__name__}"
                )
            if value.shape[-1] != self.size:
                raise ValueError(f"{name} must have {self.size} columns, found shape {tuple(value.shape)}")
            same_kind(name, next(value._tensors())[0], next(self._tensors())[0])
            batch = broadcastable(name, value.batch_shape, batch)
        rule = lookup(CONGRUENCE, type(Phi), type(self))
        if rule is None:
            raise NotClosedError(
                f"no exact rule for {type(Phi).__name__} P^-1 {type(Phi).__name__}^T with P a {type(self).__name__}; "
                "use a feature operator whose blocks match P, or pass rows as a tensor"
            )
        P, factors = self._factored()
        result: Tensor = rule(Phi, Psi, P, factors, layout, chunk)
        return result.to(self.dtype)

    def _tensor_congruence(self, Phi: Tensor, Psi: Tensor | None, layout: str) -> Tensor:
        Phi64 = self._rows("Phi", Phi).double()
        Psi64 = None if Psi is None else self._rows("Psi", Psi).double()
        if Psi64 is not None:
            broadcastable("Psi", Psi64.shape[:-2], Phi64.shape[:-2])
        P, factors = self._factored()
        if layout == "diagonal":
            return P._inv_quad(Phi64.mT, factors).to(self.dtype)
        if Psi64 is None:
            gram = Phi64 @ P._solve(Phi64.mT, factors)
            return ((gram + gram.mT) / 2).to(self.dtype)
        return (Phi64 @ P._solve(Psi64.mT, factors)).to(self.dtype)

    # -- diagonals and traces ---------------------------------------------------------------------------------

    def diagonal(self) -> Float[Tensor, "*batch D"]:
        """The diagonal of P."""
        return self._diagonal().expand(*self.batch_shape, self.size)

    def inverse_diagonal(self) -> Float[Tensor, "*batch D"]:
        """The diagonal of ``P^-1``: the marginal variances."""
        P, factors = self._factored()
        return P._inverse_diagonal(factors).to(self.dtype).expand(*self.batch_shape, self.size)

    def trace_solve(self, Q: PrecisionOperator) -> Float[Tensor, "*batch"]:
        """``tr(P^-1 Q)``.

        Raises:
            NotClosedError: if the structures of P and Q have no exact rule.
        """
        self._same_space("Q", Q)
        rule = lookup(TRACE_SOLVE, type(self), type(Q))
        if rule is None:
            raise NotClosedError(
                f"no exact structured rule for tr(P^-1 Q) with P a {type(self).__name__} and Q a {type(Q).__name__}; "
                "use IterativePrecision(P).trace_solve(Q) for an estimate, or "
                "Dense(P.to_dense()).trace_solve(Dense(Q.to_dense())) if D^2 entries are affordable"
            )
        P, factors = self._factored()
        trace: Tensor = rule(P, Q.to(torch.float64), factors)
        return trace.to(self.dtype).expand(torch.broadcast_shapes(self.batch_shape, Q.batch_shape))

    # -- roots and samples ------------------------------------------------------------------------------------

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Float[Tensor, "*sample *batch D"]:
        """Draws of N(0, P^-1), reparametrised: ``unwhiten`` of standard normal noise.

        Args:
            sample_shape: leading shape of the draws.
            generator: source of randomness; None is torch's default generator.
        """
        return self.unwhiten(
            standard_normal(sample_shape, self.shape[:-1], generator, next(self._tensors())[0])
        )

    def whiten(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """``R^T x``: turns a draw of N(0, P^-1) into standard normal noise; the inverse of `unwhiten`."""
        return self._apply_root("x", x, lambda P, X, factors: P._whiten(X, factors))

    def unwhiten(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """``R^-T z``: turns standard normal noise into a draw of N(0, P^-1)."""
        Z, restore = self._vectors("z", z, torch.promote_types(self.dtype, torch.float32))
        P, factors = self._factored()
        return restore(P._draw(Z, factors)).to(self.dtype)

    def root_matvec(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """``R z``: turns standard normal noise into a draw of N(0, P)."""
        return self._apply_root("z", z, lambda P, X, factors: P._root_matvec(X, factors))

    def root_solve(self, g: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """``R^-1 g``, whose squared norm is `inv_quad`."""
        return self._apply_root("g", g, lambda P, X, factors: P._root_solve(X, factors))

    def _apply_root(self, name: str, x: Tensor, hook: Callable[..., Tensor]) -> Tensor:
        X, restore = self._vectors(name, x)
        P, factors = self._factored()
        return restore(hook(P, X, factors)).to(self.dtype)

    # -- inverse, parts, projections --------------------------------------------------------------------------

    def inverse(self) -> Covariance:
        """``P^-1`` as a `Covariance`, whose product is a solve; its own inverse is P."""
        from curvlin.covariance import Covariance

        return Covariance(self)

    def marginal(self, index: Index, *, max_size: int = 2048) -> PrecisionOperator:
        """The precision of the coordinates `index`, in that order, the others integrated out.

        Structured where the structure is closed, else `Dense` if there are at most `max_size` coordinates.

        Raises:
            NotClosedError: if the result would be a dense matrix of more than `max_size` rows.
        """
        indices = as_index(index, self.size, self.device)
        if len(indices) == self.size:  # nothing is integrated out
            return self.conditional(indices, max_size=max_size)
        structured = self._marginal(indices, max_size)
        if structured is not None:
            return structured
        self._affordable("marginal", len(indices), max_size)
        # (S P^-1 S^T)^-1, with S the selection: k exact solves and a k x k inverse.
        P, factors = self._factored()
        covariance = P._solve(identity_columns(indices, self.size, torch.float64), factors)[..., indices, :]
        return self._dense((covariance + covariance.mT) / 2, invert=True)

    def conditional(self, index: Index, *, max_size: int = 2048) -> PrecisionOperator:
        """The precision of the coordinates `index`, in that order, the others held fixed: a sub-matrix of P.

        Structured where the structure is closed, else `Dense` if there are at most `max_size` coordinates.

        Raises:
            NotClosedError: if the result would be a dense matrix of more than `max_size` rows.
        """
        indices = as_index(index, self.size, self.device)
        structured = self._conditional(indices, max_size)
        if structured is not None:
            return structured
        self._affordable("conditional", len(indices), max_size)
        # Some columns at a time: all of them have D k entries, of which k^2 are wanted.
        parts = [
            self._matmul(identity_columns(indices[some], self.size, self.dtype))[..., indices, :]
            for some in pieces(len(indices), self.dtype.itemsize * self.size, least=len(indices))
        ]
        block = joined(parts, dim=-1)
        return self._dense((block + block.mT) / 2, invert=False)

    def _affordable(self, what: str, size: int, max_size: int) -> None:
        if size > max_size:
            raise NotClosedError(
                f"the {what} of {type(self).__name__} on {size} coordinates is a dense matrix, and max_size is "
                f"{max_size}; choose coordinates that keep the structure, or raise max_size"
            )

    def _dense(self, matrix: Tensor, *, invert: bool) -> PrecisionOperator:
        from curvlin.precision.dense import Dense

        if invert:
            P, factors = Dense(matrix)._factored()
            eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
            matrix = P._solve(eye.expand(*P.batch_shape, *eye.shape), factors)
            matrix = (matrix + matrix.mT) / 2
        return Dense(matrix.to(self.dtype))

    def project(self, onto: type[PrecisionOperator], **structure: Any) -> Any:
        """The nearest operator of type `onto` in the Frobenius norm, with the error that is made.

        Args:
            onto: `Isotropic`, `Diagonal`, `BlockDiag` (with ``indices=``) or `KroneckerSum` (with ``sizes=``).
            **structure: what `onto` needs to know; see `curvlin.projection`.

        Returns:
            `curvlin.projection.Projection`, a pair of the operator and the relative Frobenius error.
        """
        from curvlin.projection import project

        return project(self, onto, **structure)

    # -- algebra ----------------------------------------------------------------------------------------------

    def __add__(self, Q: PrecisionOperator | int) -> PrecisionOperator:
        """``P + Q`` where that is closed; symmetric in its operands in type, and in value to rounding.

        Raises:
            NotClosedError: if no exact structured sum exists.
        """
        if isinstance(Q, int) and Q == 0:  # where the builtin sum() starts
            return self
        if not isinstance(Q, PrecisionOperator):
            return NotImplemented
        self._same_space("the right operand of +", Q)
        for left, right in ((self, Q), (Q, self)):
            rule = lookup(ADD, type(left), type(right))
            if rule is not None and (total := rule(left, right)) is not None:
                result: PrecisionOperator = total
                return result
        raise NotClosedError(
            f"{type(self).__name__} + {type(Q).__name__} has no exact structured form here; project one operand onto "
            "a structure (P.project(...)), take IterativePrecision([P, Q]), whose answers come with errors, or form "
            "Dense(P.to_dense()) + Q if D^2 entries are affordable"
        )

    __radd__ = __add__

    def __mul__(self: OperatorT, c: float | Tensor) -> OperatorT:
        """``c P`` for a positive number c (or a 0-dim tensor, or one per batch element)."""
        reference = next(self._tensors())[0]
        if not isinstance(c, Tensor):
            if not isinstance(c, (int, float)):
                return NotImplemented
            c = torch.tensor(float(c), dtype=reference.dtype, device=reference.device)
        name = "the scale of an operator"
        given = floating(name, c)
        c = given.to(reference)
        if c is not given:  # a narrower dtype may not hold it
            floating(name, c)
        if is_concrete(c) and not bool((c > 0).all()):
            raise ValueError(f"{name} must be positive, found {float(c.min()):.3e}")
        broadcastable(name, c.shape, self.batch_shape)
        scaled = self._scale(c)
        unchanged = {id(t) for t, _ in self._tensors()}
        for t, _ in scaled._tensors():
            if id(t) not in unchanged:
                floating("the scaled operator", t)
        return scaled

    __rmul__ = __mul__

    def __truediv__(self: OperatorT, c: float | Tensor) -> OperatorT:
        """``P / c`` for a positive number c."""
        return self * (1 / c)

    def update(self, U: Float[Tensor, "... D k"] | FeatureOperator) -> PrecisionOperator:
        """``P + U U^T``: a tensor of k columns, or a feature operator Phi standing for ``U = Phi^T``."""
        from curvlin.precision.update import low_rank_update

        return low_rank_update(self, U, sign=+1)

    def downdate(self, U: Float[Tensor, "... D k"] | FeatureOperator) -> PrecisionOperator:
        """``P - U U^T``.

        Raises:
            NotPositiveDefiniteError: when the result is factorised, if it is not positive definite.
        """
        from curvlin.precision.update import low_rank_update

        return low_rank_update(self, U, sign=-1)

    def allclose(self, Q: PrecisionOperator, *, rtol: float = 1e-10) -> bool:
        """Whether P and Q act the same on a fixed set of probing vectors, to `rtol` of the larger result.

        In a batch, whether each of P's does what its partner does.
        """
        self._same_space("Q", Q)
        position = torch.arange(1, self.size + 1, dtype=torch.float64, device=self.device)
        phases = torch.tensor([0.7, 1.3, 2.1], dtype=torch.float64, device=self.device)
        probes = torch.cos(position[:, None] * phases).to(self.dtype)
        left, right = self._matmul(probes).double(), Q._matmul(probes.to(Q.dtype)).double()
        gap, *sizes = (t.abs().amax((-2, -1)) for t in (left - right, left, right))
        return bool((gap <= rtol * torch.maximum(*sizes)).all())

    # -- ways out ---------------------------------------------------------------------------------------------

    def to_dense(self) -> Float[Tensor, "*batch D D"]:
        """The matrix itself, with all its ``D^2`` entries."""
        return self._to_dense().expand(*self.batch_shape, self.size, self.size)

    def to_scipy(self) -> ScipyLinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` whose product is ``P @ x`` (no batch, CPU)."""
        from curvlin.interop.scipy import to_scipy

        return to_scipy(self)

    def to_linear_operator(self, as_: Literal["precision", "covariance"]) -> CurvlinLinearOperator:
        """A `linear_operator.LinearOperator` of P or of its inverse, exact or refusing: for gpytorch and BoTorch.

        Args:
            as_: which matrix the result stands for: P itself ("precision"), or ``P^-1`` ("covariance"), which is
                what gpytorch's distributions take. There is no default, because a precision in the place of a
                covariance would go unnoticed.

        Raises:
            ValueError: if `as_` is neither.
        """
        from curvlin.interop.linear_operator import to_linear_operator

        return to_linear_operator(self, as_)

    def factor(self: OperatorT, dtype: torch.dtype | None = None) -> OperatorT:
        """The same operator with its factorisation kept, for callers that ask it more than one question.

        The result is equal to P and of the same type; what is made from it (`to`, `+`, a copy, ...) is not factored.
        If a tensor of P is changed in place afterwards, using the factored operator raises `StaleFactorError`; edits
        that PyTorch does not count, through `.data` or a NumPy array that shares the memory, go unseen.

        Args:
            dtype: of the result, of what it is applied to and of its answers. What needs an inverse is answered
                from P as it is here, before it is rounded to `dtype`.
        """
        kept = self._map(lambda t, _: t) if dtype is None else self.to(dtype)
        object.__setattr__(kept, "_kept", Kept.of(self, kept))
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: not the factors, whose tensors would go on by themselves."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _factored(self: OperatorT) -> tuple[OperatorT, Any]:
        """This operator in float64, and its factors: the kept ones, or new ones."""
        kept: Kept | None = self.__dict__.get("_kept")
        if kept is None:
            P = self._working()
            return P, factorize(P)
        kept.check(self)
        # The kept float64 copy serves only the gradient mode that it was made in.
        return (kept.working if kept.live == self._needs_grad() else self._working()), kept.factors

    def _working(self: OperatorT) -> OperatorT:
        """The operator on which hooks run: itself in float64."""
        return self.to(torch.float64)

    # -- argument shapes --------------------------------------------------------------------------------------

    def _columns(self, name: str, X: Tensor) -> tuple[Tensor, bool]:
        """X as ``(..., D, K)``, and whether it was a vector."""
        self._check_right_hand_side(name, X)
        was_vector = X.ndim == 1
        X = X.unsqueeze(-1) if was_vector else X
        if X.ndim == 0 or X.shape[-2] != self.size:
            raise ValueError(
                f"{name} must have {self.size} rows, as ({self.size},) or (..., {self.size}, K); found shape "
                f"{tuple(X.shape[:-1] if was_vector else X.shape)}"
            )
        broadcastable(name, X.shape[:-2], self.batch_shape)
        return X, was_vector

    def _rows(self, name: str, X: Tensor) -> Tensor:
        self._check_right_hand_side(name, X)
        if X.ndim < 2 or X.shape[-1] != self.size:
            raise ValueError(f"{name} must have shape (..., R, {self.size}), found {tuple(X.shape)}")
        broadcastable(name, X.shape[:-2], self.batch_shape)
        return X

    def _vectors(
        self, name: str, x: Tensor, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Vectors ``(*sample, *batch, D)`` as columns ``(*batch, D, K)`` of a dtype, and the way back."""
        self._check_right_hand_side(name, x)
        if x.ndim == 0 or x.shape[-1] != self.size:
            raise ValueError(f"{name} must have shape (..., {self.size}), found {tuple(x.shape)}")
        batch = self.batch_shape
        full = broadcastable(name, x.shape[:-1], batch)
        x = x.to(dtype).expand(*full, x.shape[-1])
        n_sample = len(full) - len(batch)
        sample, batch = full[:n_sample], full[n_sample:]
        # (*sample, *batch, D) -> (*batch, D, prod(sample)): samples become columns, as every hook takes them.
        X = x.reshape(math.prod(sample), *batch, x.shape[-1]).movedim(0, -1)

        def restore(Y: Tensor) -> Tensor:
            return Y.movedim(-1, 0).reshape(*sample, *Y.shape[:-1])

        return X, restore

    def _check_right_hand_side(self, name: str, X: Tensor) -> None:
        floating(name, X, like=next(self._tensors())[0])

    def _same_space(self, name: str, Q: PrecisionOperator) -> None:
        exact_operator(name, Q)
        if Q.size != self.size:
            raise ValueError(f"{name} must have {self.size} rows like P, found {Q.size}")
        same_kind(name, next(Q._tensors())[0], next(self._tensors())[0])
        broadcastable(name, Q.batch_shape, self.batch_shape)

    # -- hooks: what an operator has to say -------------------------------------------------------------------
    # `factors` is what `_factorize` returned: a Tree, a tuple of them, or None, always constant to derivatives.

    @abstractmethod
    def _factorize(self) -> Any:
        """Everything that solves, determinants and roots share. Called on detached float64 tensors.

        Whatever looks at values (definiteness, a switch of algorithm) belongs here.
        """

    @abstractmethod
    def _matmul(self, X: Tensor) -> Tensor:
        """``P X`` for ``X`` of shape ``(..., D, K)``, by plain differentiable operations."""

    def _energy(self, X: Tensor) -> Tensor:
        """``x^T P x`` of each column, by plain differentiable operations: ``(..., D, K) -> (..., K)``."""
        return (X * self._matmul(X)).sum(-2)

    def _energy_of(self, solution: Tensor, X: Tensor, factors: Any) -> Tensor:
        """`_energy` of ``P^-1 X``, for operators that know parts of it better than from the rounded solution."""
        return self._energy(solution)

    @abstractmethod
    def _solve(self, X: Tensor, factors: Any) -> Tensor:
        """``P^-1 X``, ``(..., D, K)``."""

    @abstractmethod
    def _inv_quad(self, X: Tensor, factors: Any) -> Tensor:
        """``x^T P^-1 x`` of each column x of X: ``(..., D, K) -> (..., K)``."""

    @abstractmethod
    def _logdet(self, factors: Any) -> Tensor:
        """``log det P``, ``(...)``."""

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """The diagonal of P, ``(..., D)``."""

    @abstractmethod
    def _inverse_diagonal(self, factors: Any) -> Tensor:
        """The diagonal of P^-1, ``(..., D)``."""

    @abstractmethod
    def _whiten(self, X: Tensor, factors: Any) -> Tensor:
        """``R^T X``."""

    @abstractmethod
    def _unwhiten(self, Z: Tensor, factors: Any) -> Tensor:
        """``R^-T Z``."""

    def _draw(self, Z: Tensor, factors: Any) -> Tensor:
        """`_unwhiten` of noise in the caller's dtype, float32 at least, and in that dtype.

        Overridden where the root is an orthogonal basis and a scale for each direction: products of these in the dtype
        of the draws keep its accuracy, and cost half of what they do in float64.
        """
        return self._unwhiten(Z.double(), factors).to(Z.dtype)

    @abstractmethod
    def _root_matvec(self, Z: Tensor, factors: Any) -> Tensor:
        """``R Z``."""

    @abstractmethod
    def _root_solve(self, G: Tensor, factors: Any) -> Tensor:
        """``R^-1 G``."""

    @abstractmethod
    def _scale(self: OperatorT, c: Tensor) -> OperatorT:
        """``c P`` for a positive c."""

    @abstractmethod
    def _marginal(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        """The structured marginal precision, or None where it is a dense matrix."""

    @abstractmethod
    def _conditional(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        """The structured sub-matrix, or None where it is a dense matrix."""

    @abstractmethod
    def _to_dense(self) -> Tensor:
        """The matrix."""


def exact_operator(name: str, value: object, mend: str = "") -> PrecisionOperator:
    """`value`, which has to be an exact operator.

    Raises:
        TypeError: if it is something else; `mend` says what to do with a matrix.
    """
    if isinstance(value, PrecisionOperator):
        return value
    if getattr(value, "exact", True) is False:
        mend = "whose answers are not exact: ask it by its own solve, logdet, trace_solve or sample"
    raise TypeError(
        f"{name} must be a PrecisionOperator, found {type(value).__name__}{', ' if mend else ''}{mend}"
    )
