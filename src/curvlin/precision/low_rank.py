"""Low-rank changes of a precision: ``Z + U C U^T`` for any base Z, and ``diag(d) + U U^T``.

All of it happens in coordinates that whiten the base, ``R_Z R_Z^T = Z``, where P is ``I + s V V^T`` with ``V =
R_Z^-1 U`` and ``s = +1`` (update) or ``-1`` (downdate); the root of P is ``R_Z (I + s V V^T)^{1/2}``. Where V is
large it is not formed: it acts as ``V c = R_Z^-1 U c``, ``V^T x = U^T R_Z^-T x``. A feature operator in the place
of U is never multiplied out, and only its k x k congruence with Z is formed: the dual (kernel) form of a
posterior precision.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating, same_kind, symmetric
from curvlin._tables import CONGRUENCE, lookup
from curvlin._tree import Tree, build, is_concrete, needs_grad, static_field, tensor_field
from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.features.base import FeatureOperator
from curvlin.numerics import tall
from curvlin.numerics.implicit import graft, without_derivative
from curvlin.numerics.low_rank import (
    ALWAYS_ORTHONORMAL,
    INVERSE,
    INVERSE_ROOT,
    ROOT,
    LowRankFactors,
    from_columns,
    from_gram,
    full_spectrum,
    gram_is_safe,
    leverage_split,
    leverages,
    over_capacitance,
    root_of_middle,
    spectral_change,
    spectral_value,
    split_off,
    symmetric_gram,
)
from curvlin.numerics.refinement import refine
from curvlin.numerics.symmetric_root import symmetric_root
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.implicit import ImplicitLogdetOperator


@dataclass(eq=False, repr=False)
class CanonicalFactors(Tree):
    """An operator without a core that equals the one with it, and its factors."""

    operator: Any = tensor_field(0)
    factors: Any = tensor_field(0)
    definite: bool = static_field()


@dataclass(eq=False, repr=False, init=False)
class Woodbury(ImplicitLogdetOperator):
    """``base + U core U^T``: any positive definite base, changed in k directions.

    Args:
        base: Z, positive definite where P is solved or sampled.
        U: ``(*batch, D, k)``, or a feature operator Phi standing for ``U = Phi^T`` (k = N R).
        core: C, symmetric ``(*batch, k, k)``, possibly singular or indefinite; the identity when None. Beside a
            feature operator it must be None: mix the rows of Phi instead (``S @ Phi``).

    Raises:
        TypeError, ValueError: if arguments do not fit each other.
        NotClosedError: for a core beside a feature operator.
    """

    base: PrecisionOperator = tensor_field(0)
    U: Float[Tensor, "*batch D k"] | FeatureOperator = tensor_field(2)
    core: Float[Tensor, "*batch k k"] | None = tensor_field(2)
    weight: Float[Tensor, "*batch"] | None = tensor_field(0)
    sign: int = static_field()

    def __init__(
        self,
        base: PrecisionOperator,
        U: Float[Tensor, "*batch D k"] | FeatureOperator,
        core: Float[Tensor, "*batch k k"] | None = None,
    ) -> None:
        if not isinstance(base, PrecisionOperator):
            raise TypeError(f"base must be a PrecisionOperator, found {type(base).__name__}")
        batch = check_columns(U, base)
        if core is not None:
            if isinstance(U, FeatureOperator):
                raise NotClosedError(
                    "a core beside a feature operator is not closed; mix its rows instead: S @ Phi"
                )
            core = symmetric("core", core, like=U)
            if core.shape[-1] != U.shape[-1]:
                raise ValueError(f"core must have {U.shape[-1]} rows, found shape {tuple(core.shape)}")
            broadcastable("core", core.shape[:-2], batch)
        self.base, self.U, self.core, self.weight, self.sign = base, U, core, None, 1

    def _with(self, cls: type | None = None, **changes: Any) -> Any:
        """As everywhere; a base that is not diagonal makes it a plain `Woodbury`."""
        keeps_type = isinstance(changes.get("base", self.base), (Diagonal, Isotropic))
        return super()._with(cls or (type(self) if keeps_type else Woodbury), **changes)

    def _working(self) -> Woodbury:
        """In float64, but for a large U, which is widened a slice at a time where it is used."""
        if (
            self.core is not None
            or isinstance(self.U, FeatureOperator)
            or self.U.numel() <= ALWAYS_ORTHONORMAL
        ):
            return self.to(torch.float64)
        working: Woodbury = self._with(U=self.U[..., :1, :]).to(torch.float64)
        return working._with(U=self.U)

    @property
    def size(self) -> int:
        return self.base.size

    @property
    def rank(self) -> int:
        """k, the number of columns of U."""
        if isinstance(self.U, FeatureOperator):
            return self.U.n_samples * self.U.n_rows
        return self.U.shape[-1]

    # -- U, applied -------------------------------------------------------------------------------------------

    def _spread(self, c: Tensor) -> Tensor:
        """``U c``: ``(..., k, K) -> (..., D, K)``."""
        if isinstance(self.U, FeatureOperator):
            return self.U._rmatmul(c.unflatten(-2, (self.U.n_samples, self.U.n_rows)))
        return tall.spread(self.U, c)

    def _collect(self, X: Tensor) -> Tensor:
        """``U^T X``: ``(..., D, K) -> (..., k, K)``."""
        if isinstance(self.U, FeatureOperator):
            return self.U._matmul(X).flatten(-3, -2)
        return tall.collect(self.U, X)

    def _column_parts(self) -> Iterator[Tensor]:
        """The columns of U, as many at a time as may be formed: all at once where U is a tensor."""
        if isinstance(self.U, Tensor):
            yield self.U
            return
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        for part in eye.split(self._width(), dim=-1):
            yield self._spread(part)

    def _width(self) -> int:
        """How many columns of size D may be formed at a time: as many as take the memory of the operator."""
        return max(1, sum(t.numel() for t, _ in self._tensors()) // self.size)

    def _weighted(self, X: Tensor) -> Tensor:
        """``s w X``."""
        X = X if self.weight is None else self.weight[..., None, None] * X
        return X if self.sign > 0 else -X

    def _gram(self, base_factors: Any) -> Tensor:
        """``U^T Z^-1 U``, differentiable."""
        if isinstance(self.U, FeatureOperator):
            rule = lookup(CONGRUENCE, type(self.U), type(self.base))
            if rule is None:
                raise NotClosedError(
                    f"no exact rule for {type(self.U).__name__} Z^-1 {type(self.U).__name__}^T with Z a "
                    f"{type(self.base).__name__}; use features whose blocks match the base"
                )
            gram = rule(self.U, None, self.base, base_factors, "joint", None).double()
            gram = gram.flatten(-2).flatten(-3, -2)
        elif isinstance(self.base, (Diagonal, Isotropic)):
            if self._needs_grad():
                return symmetric_gram(self.base._root_solve(self.U, base_factors))
            return tall.gram(self.U, self.base._column().rsqrt())
        else:
            U = self.U.double()
            gram = U.mT @ self.base._solve(U, base_factors)
        return (gram + gram.mT) / 2

    def _unweighted(self) -> Woodbury:
        """``P / w = Z / w + s U U^T``, on which all numerics run: a common scale of Z and w leaves no trace."""
        return (
            self if self.weight is None else self._with(base=self.base._scale(1 / self.weight), weight=None)
        )

    def _over_weight(self, X: Tensor, own: int) -> Tensor:
        """``X / w`` for X with `own` dimensions of its own."""
        return X if self.weight is None else X / self.weight[(..., *(None,) * own)]

    # -- factorisation ----------------------------------------------------------------------------------------

    def _factorize(self) -> LowRankFactors | CanonicalFactors:
        if self.core is not None:
            return self._canonical()
        normal = self._unweighted()
        try:
            base = normal.base._factorize()
        except NotPositiveDefiniteError as error:
            raise error.within("Woodbury.base") from None
        gram = None
        if isinstance(self.U, FeatureOperator) or self.U.numel() > ALWAYS_ORTHONORMAL:
            gram = normal._gram(base)
        if isinstance(self.U, Tensor) and (gram is None or not gram_is_safe(gram, self.sign)):
            Q, W, gain, h = from_columns(normal.base._root_solve(self.U.double(), base), self.sign)
        else:
            assert gram is not None
            Q, (W, gain, h) = None, from_gram(gram, self.sign)
        if not bool((h > 0).all()):
            raise NotPositiveDefiniteError("Woodbury", float(h.min()))
        return LowRankFactors(base, Q, W, gain, h)

    def _canonical(self) -> CanonicalFactors:
        """The core as ``E diag(gamma) E^T``, its positive part an update and its negative part a downdate."""
        assert self.core is not None and isinstance(self.U, Tensor)
        lower, info = torch.linalg.cholesky_ex(self.core)
        pivots = lower.diagonal(dim1=-2, dim2=-1).square()
        # A pivot near rounding would have a Cholesky factor without usable derivatives.
        regular = pivots > _LEAST_PIVOT * self.core.diagonal(dim1=-2, dim2=-1)
        if bool((info == 0).all()) and bool(regular.all()):
            definite = self._with(core=None, U=self.U @ lower)
            return CanonicalFactors(definite, definite._factorize(), True)
        gamma, E = torch.linalg.eigh(self.core)
        columns = self.U @ E
        # Rounding in the stored entries, and in the decomposition, that a zero eigenvalue may show.
        tiny = torch.maximum(
            self.resolution * torch.linalg.vector_norm(gamma, dim=-1, keepdim=True),
            gamma.shape[-1] * torch.finfo(gamma.dtype).eps * gamma.abs().amax(-1, keepdim=True),
        )
        gamma = torch.where(gamma.abs() <= tiny, 0.0, gamma)
        total = self._with(core=None, U=columns * gamma.clamp(min=0.0).sqrt().unsqueeze(-2))
        if bool((gamma < 0).any()):
            lost = columns * (-gamma).clamp(min=0.0).sqrt().unsqueeze(-2)
            total = total._with(base=total, U=lost, sign=-self.sign)
        return CanonicalFactors(total, total._factorize(), False)

    def _rooted(self, factors: Any) -> tuple[Woodbury, LowRankFactors]:
        """This operator without a core, differentiable, for what needs a root of it."""
        if isinstance(factors, LowRankFactors):
            return self, factors
        if not (self._needs_grad() and factors.definite):
            return factors.operator, factors.factors
        assert self.core is not None and isinstance(self.U, Tensor)
        return self._with(core=None, U=self.U @ torch.linalg.cholesky_ex(self.core).L), factors.factors

    def _finished_root(self, result: Tensor, factors: Any) -> Tensor:
        """What a root returns; a core without a Cholesky factor leaves it without a derivative in P."""
        if isinstance(factors, LowRankFactors) or factors.definite or not self._needs_grad():
            return result
        return without_derivative(
            result,
            [t for t, _ in self._tensors()],
            "the root of Woodbury with a singular or indefinite core has no derivative; make the core positive "
            "definite, or detach the operator",
        )

    # -- in whitened coordinates -------------------------------------------------------------------------------

    def _collect_white(self, v: Tensor, factors: LowRankFactors) -> Tensor:
        """``V^T v`` without V."""
        return self._collect(self.base._unwhiten(v, factors.base))

    def _spread_white(self, c: Tensor, factors: LowRankFactors) -> Tensor:
        """``V c`` without V."""
        return self.base._root_solve(self._spread(c), factors.base)

    def _along(self, v: Tensor, factors: LowRankFactors) -> Tensor:
        """``W^T V^T v``."""
        if factors.Q is not None:
            return factors.gain.sqrt().unsqueeze(-1) * (factors.Q.mT @ v)
        return factors.W.mT @ self._collect_white(v, factors)

    def _back(self, c: Tensor, factors: LowRankFactors) -> Tensor:
        """``V W c``."""
        if factors.Q is not None:
            return factors.Q @ (factors.gain.sqrt().unsqueeze(-1) * c)
        return self._spread_white(factors.W @ c, factors)

    def _shrink(self, v: Tensor, function: str, factors: LowRankFactors) -> Tensor:
        """``f(I + s V V^T) v`` for the inverse and the inverse root."""
        h = factors.h.unsqueeze(-1)
        if factors.Q is not None:
            c, rest = split_off(factors.Q, v)
            return rest + factors.Q @ (spectral_value(h, function) * c)

        def apply(f: str, x: Tensor) -> Tensor:
            return x + self._back(spectral_change(h, f, self.sign) * self._along(x, factors), factors)

        if function != INVERSE_ROOT:
            return apply(function, v)  # what solves with it refines its own result
        # The inverse root cancels along large gains; the root, by which it is refined, does not.
        norm = factors.h.amax(-1).clamp(min=1.0).sqrt()
        return refine(
            apply(INVERSE_ROOT, v), v, lambda x: apply(ROOT, x), lambda r: apply(INVERSE_ROOT, r), norm
        )

    def _capacitance(self, base_factors: Any) -> Tensor:
        """``H = I + s G C`` with ``G = U^T Z^-1 U = V^T V``, without a weight, differentiable."""
        change = self.sign * self._gram(base_factors)
        if self.core is not None:
            change = change @ self.core
        return change + torch.eye(self.rank, dtype=change.dtype, device=change.device)

    def _capacitance_root(self, factors: LowRankFactors) -> tuple[Tensor, Tensor]:
        """H and ``S = H^{1/2}``, differentiable."""
        H = self._capacitance(factors.base)
        W, h = full_spectrum(factors)
        return H, symmetric_root(H, W, h)

    # -- products, solves, determinants -----------------------------------------------------------------------

    def _matmul(self, X: Tensor) -> Tensor:
        c = self._collect(X)
        return self.base._matmul(X) + self._spread(self._weighted(c if self.core is None else self.core @ c))

    def _energy(self, X: Tensor) -> Tensor:
        return self._energy_along(X, self._collect(X))

    def _energy_along(self, X: Tensor, c: Tensor) -> Tensor:
        change = (c * (c if self.core is None else self.core @ c)).sum(-2, keepdim=True)
        return self.base._energy(X) + self._weighted(change).squeeze(-2)

    def _energy_of(self, solution: Tensor, X: Tensor, factors: Any) -> Tensor:
        """With ``U^T P^-1 X`` from its own k equations where they are good: it is small beside ``|U| |P^-1 X|``."""
        if not self._has_safe_gram(factors):
            return self._energy(solution)
        with torch.no_grad():
            c = self._over_weight(self._unweighted()._coefficients(X, factors), 2)
        return self._energy_along(solution, graft(c, self._collect(solution)))

    def _has_safe_gram(self, factors: Any) -> bool:
        return isinstance(factors, LowRankFactors) and factors.Q is None and isinstance(self.U, Tensor)

    def _coefficients(self, X: Tensor, factors: LowRankFactors) -> Tensor:
        """``U^T P^-1 X = H^-1 U^T Z^-1 X``, without a weight."""
        return over_capacitance(self._collect(self.base._solve(X, factors.base)), factors)

    def _solve_value(self, X: Tensor, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            return factors.operator._solve_value(X, factors.factors)
        normal = self._unweighted()
        # Refinement repairs what whitening by an ill-conditioned base, or a Gram matrix, has cost.
        x = refine(
            normal._solve_once(X, factors),
            X,
            normal._matmul,
            lambda R: normal._solve_once(R, factors),
            normal._least_norm(factors),
        )
        return self._over_weight(x, 2)

    def _least_norm(self, factors: LowRankFactors) -> Tensor:
        """A lower bound of the norms that rounding in ``P x`` is relative to."""
        diagonal = self.base._diagonal()
        largest = diagonal.amax(-1)
        if isinstance(self.base, (Diagonal, Isotropic)):
            largest = torch.maximum(largest, factors.gain.amax(-1) * diagonal.amin(-1))
        return largest

    def _solve_once(self, X: Tensor, factors: LowRankFactors) -> Tensor:
        white = self._shrink(self.base._root_solve(X, factors.base), INVERSE, factors)
        return self.base._unwhiten(white, factors.base)

    def _inv_quad_value(self, X: Tensor, factors: Any) -> Tensor:
        """A sum of squares in every route."""
        if isinstance(factors, CanonicalFactors):
            return factors.operator._inv_quad_value(X, factors.factors)
        normal = self._unweighted()
        if self.sign < 0:
            white = normal._shrink(normal.base._root_solve(X, factors.base), INVERSE_ROOT, factors)
            return self._over_weight(white.square().sum(-2), 1)
        return self._over_weight(normal._minimum(X, factors)[0], 1)

    def _inv_quad_and_solution(self, X: Tensor, factors: Any) -> tuple[Tensor, Tensor]:
        if isinstance(factors, CanonicalFactors) or self.sign < 0:
            return super()._inv_quad_and_solution(X, factors)
        normal = self._unweighted()
        quad, rest = normal._minimum(X, factors)
        return self._over_weight(quad, 1), self._over_weight(normal.base._solve(rest, factors.base), 2)

    def _minimum(self, X: Tensor, factors: LowRankFactors) -> tuple[Tensor, Tensor]:
        """For an update: ``x^T P^-1 x = min_t (x - U t)^T Z^-1 (x - U t) + t^T t``, and the minimal ``x - U t``.

        Errors of t count squared. The minimum is at ``t = U^T P^-1 x``, from k equations ``(I + U^T Z^-1 U) t =
        U^T Z^-1 x``, and leaves ``x - U t = Z P^-1 x``.
        """
        t = self._coefficients(X, factors)
        rest = X - self._spread(t)
        if not self._has_safe_gram(factors):
            for _ in range(2):
                missing = self._collect(self.base._solve(rest, factors.base)) - t
                t = t + over_capacitance(missing, factors)
                rest = X - self._spread(t)
        return self.base._inv_quad(rest, factors.base) + t.square().sum(-2), rest

    def _logdet_value(self, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            value: Tensor = factors.operator._logdet_value(factors.factors)
            return value
        return self._base_logdet(factors) + self._logdet_change(factors)

    def _base_logdet(self, factors: LowRankFactors) -> Tensor:
        return self._weighted_logdet(self._unweighted().base._logdet(factors.base))

    def _weighted_logdet(self, logdet: Tensor) -> Tensor:
        """``log det (w X)`` from ``log det X``."""
        return logdet if self.weight is None else logdet + self.size * self.weight.log()

    def _logdet_change(self, factors: LowRankFactors) -> Tensor:
        """``log det P - log det Z = log det H``, differentiable."""
        change = torch.log1p(factors.gain) if self.sign > 0 else factors.h.log()
        value = change.sum(-1)
        return graft(value, self._unweighted()._live_logdet(factors)) if self._needs_grad() else value

    def _logdet_gradient(self, factors: Any) -> list[Tensor]:
        full = self.expand(self.batch_shape)
        structure = full._structure()

        def live(*tensors: Tensor) -> Tensor:
            P: Woodbury = build(structure, tensors)
            if isinstance(factors, CanonicalFactors):
                return P._core_logdet(factors)
            return P._base_logdet(factors) + P._unweighted()._live_logdet(factors)

        with torch.enable_grad():
            output, vjp = torch.func.vjp(live, *(t for t, _ in full._tensors()))[:2]
        return list(vjp(torch.ones_like(output)))

    def _logdet_pull_back(self, g: Tensor, factors: Any) -> list[Tensor]:
        """For ``diag(d) + s U U^T``, in one pass over U: ``g diag(P^-1)`` (summed for one d) and ``2 s g P^-1 U``."""
        plain = isinstance(self.U, Tensor) and isinstance(factors, LowRankFactors) and self.weight is None
        eager = self._is_concrete() and not torch.is_grad_enabled()
        if not (plain and eager) or self.batch_shape or not isinstance(self.base, (Diagonal, Isotropic)):
            return super()._logdet_pull_back(g, factors)
        assert isinstance(self.U, Tensor)
        gradient = torch.empty_like(self.U)
        scale = self.base._column().rsqrt()
        leverage = leverages(self.U, scale, factors, out=gradient, weight=2 * self.sign * g)
        diagonal = g * self._diagonal_from_leverage(leverage, factors)
        return [diagonal.sum() if isinstance(self.base, Isotropic) else diagonal, gradient]

    def _live_logdet(self, factors: LowRankFactors) -> Tensor:
        """``log det H`` around the accurate spectrum: its derivative ``H^-1 dH`` comes from there."""
        W, h = full_spectrum(factors)
        whitening = W / h.sqrt().unsqueeze(-2)
        inner = whitening.mT @ self._capacitance(factors.base) @ whitening
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        lower = torch.linalg.cholesky_ex(graft(eye.expand_as(inner), inner)).L
        return 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _core_logdet(self, factors: CanonicalFactors) -> Tensor:
        """``log det Z + log det(I + s G C)``: no root of the core, which may be singular."""
        normal, base = self._unweighted(), self._base_factors(factors)
        H = normal._capacitance(base)
        return self._weighted_logdet(normal.base._logdet(base)) + torch.linalg.slogdet(H).logabsdet

    def _diagonal(self) -> Tensor:
        return self.base._diagonal() + self._weighted(self._low_rank_diagonal().unsqueeze(-1)).squeeze(-1)

    def _low_rank_diagonal(self) -> Tensor:
        """The diagonal of ``U C U^T``."""
        if isinstance(self.U, Tensor):
            columns = self.U if self.core is None else self.U @ self.core
            return (columns * self.U).sum(-1)
        # Columns of Phi are U's rows: as many at a time as take the memory of the operator.
        width = max(1, sum(t.numel() for t, _ in self._tensors()) // self.rank)
        positions = torch.arange(self.size, device=self.device)
        parts = [self.U._columns(part).square().sum((-3, -2)) for part in positions.split(width)]
        return torch.cat(parts, dim=-1)

    def _inverse_diagonal(self, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            value: Tensor = factors.operator._inverse_diagonal(factors.factors)
            return graft(value, self._core_inverse_diagonal(factors)) if self._needs_grad() else value
        normal = self._unweighted()
        value = normal._inverse_diagonal_value(factors)
        if self._needs_grad():
            removed = normal._removed(normal._live_root_of_middle(factors), factors)
            value = graft(value, normal.base._inverse_diagonal(factors.base) - self.sign * removed)
        return self._over_weight(value, 1)

    def _core_inverse_diagonal(self, factors: CanonicalFactors) -> Tensor:
        """``diag(Z^-1)`` less that of ``s W M W^T``: no root of the core."""
        assert isinstance(self.U, Tensor)
        normal, base = self._unweighted(), self._base_factors(factors)
        columns = normal.base._solve(self.U.double(), base)
        removed = ((columns @ normal._middle(base)) * columns).sum(-1)
        return self._over_weight(normal.base._inverse_diagonal(base) - self.sign * removed, 1)

    def _middle(self, base: Any) -> Tensor:
        """``M = C (I + s G C)^-1``, with which ``P^-1 = Z^-1 - s W M W^T``, ``W = Z^-1 U``, without a weight."""
        assert self.core is not None
        return torch.linalg.solve(self._capacitance(base), self.core, left=False)

    def _base_factors(self, factors: CanonicalFactors) -> Any:
        """The factors of Z, which one or two changes of the canonical form lie on."""
        operator, inner = factors.operator, factors.factors
        changes = 1 if factors.definite or operator.sign == self.sign else 2
        for _ in range(changes):
            inner = inner.base
        return inner

    def _inverse_diagonal_value(self, factors: LowRankFactors) -> Tensor:
        """``diag(Z^-1)`` less what the update removes; where that cancels, a leverage split or single solves."""
        if isinstance(self.U, Tensor) and isinstance(self.base, (Diagonal, Isotropic)):
            scale = self.base._column().rsqrt()
            return self._diagonal_from_leverage(leverages(self.U, scale, factors), factors)
        prior = self.base._inverse_diagonal(factors.base)
        if factors.Q is None:
            removed = self._removed(root_of_middle(factors), factors)
        else:
            columns = self.base._unwhiten(factors.Q, factors.base)
            removed = (columns.square() * (factors.gain / factors.h).unsqueeze(-2)).sum(-1)
        result = prior - self.sign * removed
        if self.sign < 0 or not is_concrete(result):
            return result
        cancelled = (result < prior / 2).flatten(0, -2).any(0) if result.ndim > 1 else result < prior / 2
        for rows in cancelled.nonzero().squeeze(-1).split(self._width()):
            selection = torch.zeros(self.size, len(rows), dtype=self.dtype, device=self.device)
            selection[rows, torch.arange(len(rows), device=self.device)] = 1.0
            result[..., rows] = self._inv_quad_value(selection, factors)
        return result

    def _diagonal_from_leverage(self, leverage: Tensor, factors: LowRankFactors) -> Tensor:
        """``(1 - s h_i) / d_i`` for a diagonal base, with the leverages split off that come near 1."""
        prior = self.base._inverse_diagonal(factors.base)
        share = 1 - self.sign * leverage
        # Inside transforms values cannot be looked at, and the formula as it stands has to do.
        if self.sign > 0 and is_concrete(leverage) and bool((leverage > 0.5).any()):
            assert isinstance(self.U, Tensor)
            V = self.base._root_solve(self.U.double(), factors.base)
            V = V.expand(*leverage.shape[:-1], *V.shape[-2:]).flatten(0, -3) if leverage.ndim > 1 else V[None]
            rows = leverage.reshape(-1, leverage.shape[-1])
            share = torch.stack([leverage_split(v, h) for v, h in zip(V, rows, strict=True)]).view_as(
                leverage
            )
        return prior * share

    def _trace_removed(self, Q: PrecisionOperator, factors: LowRankFactors) -> Tensor:
        """``tr(H^-1 W^T Q W)`` with ``W = Z^-1 U``, for weight 1."""

        def trace(root: Tensor) -> Tensor:
            parts = self._solved_parts(root, factors)
            return functools.reduce(torch.add, ((w * Q._matmul(w)).sum((-2, -1)) for w in parts))

        value = trace(root_of_middle(factors))
        return graft(value, trace(self._live_root_of_middle(factors))) if self._needs_grad() else value

    def _live_root_of_middle(self, factors: LowRankFactors) -> Tensor:
        """``L^-T`` of ``H = L L^T``, differentiable: another root of ``H^-1`` than `root_of_middle`."""
        H = self._capacitance(factors.base)
        eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
        return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(H).L.mT, eye.expand_as(H), upper=True)

    def _removed(self, root: Tensor, factors: LowRankFactors) -> Tensor:
        """The diagonal of ``Z^-1 U H^-1 U^T Z^-1``, given R with ``R R^T = H^-1``."""
        return functools.reduce(torch.add, (w.square().sum(-1) for w in self._solved_parts(root, factors)))

    def _solved_parts(self, root: Tensor, factors: LowRankFactors) -> Iterator[Tensor]:
        """The columns of ``Z^-1 U R``, as many at a time as may be formed."""
        for part in root.split(self._width(), dim=-1):
            yield self.base._solve(self._spread(part), factors.base)

    # -- roots ------------------------------------------------------------------------------------------------

    # Each value has a twin by differentiable operations, with S = H^{1/2}, whose derivatives it takes:
    #   I + s V (I + S)^-1 V^T for the root of I + s V V^T, I - s V (H + S)^-1 V^T for its inverse.
    # The root adds U c itself, not R_Z V c: rows of very different size keep their digits.

    def _whiten(self, X: Tensor, factors: Any) -> Tensor:
        given = factors
        P, factors, scale = self._rooted_normal(given)
        c = (factors.W.mT @ P._collect(X)) * spectral_change(factors.h, ROOT, P.sign).unsqueeze(-1)
        value = P.base._whiten(X, factors.base) + P._back(c, factors)
        if P._needs_grad() or needs_grad(X):
            c = P.sign * _after_identity(P._capacitance_root(factors)[1], P._collect(X))
            value = graft(value, P.base._whiten(X, factors.base) + P._spread_white(c, factors))
        return self._finished_root(value * scale.sqrt()[..., None, None], given)

    def _unwhiten(self, Z: Tensor, factors: Any) -> Tensor:
        given = factors
        P, factors, scale = self._rooted_normal(given)
        value = P.base._unwhiten(P._shrink(Z, INVERSE_ROOT, factors), factors.base)
        if P._needs_grad() or needs_grad(Z):
            H, S = P._capacitance_root(factors)
            u = P.base._unwhiten(Z, factors.base)
            c = P.sign * torch.linalg.solve(H + S, P._collect(u))
            value = graft(value, u - P.base._solve(P._spread(c), factors.base))
        return self._finished_root(value / scale.sqrt()[..., None, None], given)

    def _root_matvec(self, Z: Tensor, factors: Any) -> Tensor:
        given = factors
        P, factors, scale = self._rooted_normal(given)
        c = factors.W @ (spectral_change(factors.h, ROOT, P.sign).unsqueeze(-1) * P._along(Z, factors))
        value = P.base._root_matvec(Z, factors.base) + P._spread(c)
        if P._needs_grad() or needs_grad(Z):
            c = P.sign * _after_identity(P._capacitance_root(factors)[1], P._collect_white(Z, factors))
            value = graft(value, P.base._root_matvec(Z, factors.base) + P._spread(c))
        return self._finished_root(value * scale.sqrt()[..., None, None], given)

    def _root_solve(self, G: Tensor, factors: Any) -> Tensor:
        given = factors
        P, factors, scale = self._rooted_normal(given)
        value = P._shrink(P.base._root_solve(G, factors.base), INVERSE_ROOT, factors)
        if P._needs_grad() or needs_grad(G):
            H, S = P._capacitance_root(factors)
            c = P.sign * torch.linalg.solve(H + S, P._collect(P.base._solve(G, factors.base)))
            value = graft(value, P.base._root_solve(G - P._spread(c), factors.base))
        return self._finished_root(value / scale.sqrt()[..., None, None], given)

    def _rooted_normal(self, factors: Any) -> tuple[Woodbury, LowRankFactors, Tensor]:
        """``P / w`` without core or weight, its factors, and w, all differentiable."""
        P, factors = self._rooted(factors)
        ones = torch.ones((), dtype=self.dtype, device=self.device)
        return P._unweighted(), factors, ones if P.weight is None else P.weight

    # -- algebra ----------------------------------------------------------------------------------------------

    def _scale(self, c: Tensor) -> Woodbury:
        weight = c if self.weight is None else c * self.weight
        return self._with(base=self.base._scale(c), weight=weight)

    def _conditional(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        base = self.base._conditional(index, max_size)
        if base is None or isinstance(self.U, FeatureOperator):
            return None
        return self._with(base=base, U=self.U[..., index, :])

    def _marginal(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        """With Z = Z_A + Z_B without coupling: ``Z_A + s w U_A (I + s w U_B^T Z_B^-1 U_B)^-1 U_A^T``."""
        if self.core is not None or isinstance(self.U, FeatureOperator):
            return None
        if not _decouples(self.base, index):
            return None
        inside = torch.zeros(self.size, dtype=torch.bool, device=index.device)
        inside[index] = True
        rest = (~inside).nonzero().squeeze(-1)
        kept = self._with(base=self.base.conditional(index, max_size=max_size), U=self.U[..., index, :])
        if len(rest) == 0:
            return kept
        others = self._with(base=self.base.conditional(rest, max_size=max_size), U=self.U[..., rest, :])
        others, factors = others._factored()
        root = others._unweighted()._capacitance_root(factors)[1]
        assert isinstance(kept.U, Tensor)
        return kept._with(U=torch.linalg.solve(root, kept.U.double().mT).mT.to(self.dtype))

    def _to_dense(self) -> Tensor:
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        columns = self._spread(eye)
        low_rank = (columns if self.core is None else columns @ self.core) @ columns.mT
        return self.base.to_dense() + self._weighted(low_rank)


@dataclass(eq=False, repr=False, init=False)
class LowRankPlusDiag(Woodbury):
    """``diag(d) + U U^T``.

    Args:
        diagonal: d, ``(*batch, D)``, positive where the operator is solved or sampled.
        U: ``(*batch, D, k)``.

    Raises:
        TypeError, ValueError: if the arguments are not floating tensors that fit each other.
    """

    def __init__(self, diagonal: Float[Tensor, "*batch D"], U: Float[Tensor, "*batch D k"]) -> None:
        if not isinstance(U, Tensor):
            raise TypeError(
                f"U must be a torch.Tensor, found {type(U).__name__}; use Woodbury for feature operators"
            )
        super().__init__(Diagonal(diagonal), U)


_LEAST_PIVOT = 1e-10
"""The smallest squared pivot of a core, relative to its diagonal entry, that counts as definite."""


def _after_identity(S: Tensor, c: Tensor) -> Tensor:
    """``(I + S)^-1 c``."""
    return torch.linalg.solve(S + torch.eye(S.shape[-1], dtype=S.dtype, device=S.device), c)


def _decouples(base: PrecisionOperator, index: Tensor) -> bool:
    """Whether the base has no entry between the coordinates of `index` and the others."""
    if isinstance(base, (Isotropic, Diagonal)):
        return True
    if isinstance(base, BlockDiag):
        chosen = torch.zeros(base.size, dtype=torch.bool)
        chosen[index.cpu()] = True
        touched = [chosen[block] for block in base.indices.blocks]
        return all(bool(t.all()) or not bool(t.any()) for t in touched)
    return len(index) == base.size


def check_columns(U: object, base: PrecisionOperator) -> torch.Size:
    """U is ``(..., D, k)``, or features over D coordinates, of the base's dtype and device; their common batch."""
    like = next(base._tensors())[0]
    if isinstance(U, FeatureOperator):
        if U.size != base.size:
            raise ValueError(f"U must have {base.size} features per row, found shape {tuple(U.shape)}")
        same_kind("U", next(U._tensors())[0], like)
        return broadcastable("U", U.batch_shape, base.batch_shape)
    columns = floating("U", U, ndim=2, like=like)
    if columns.shape[-2] != base.size or columns.shape[-1] == 0:
        raise ValueError(f"U must have shape (..., {base.size}, k) with k >= 1, found {tuple(columns.shape)}")
    return broadcastable("U", columns.shape[:-2], base.batch_shape)
