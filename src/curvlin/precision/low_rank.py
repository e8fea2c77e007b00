"""Low-rank changes of a precision: ``Z + U C U^T`` for any base Z, and ``diag(d) + U U^T``.

All of it happens in coordinates that whiten the base, ``R_Z R_Z^T = Z``, where P is ``I + s V V^T`` with ``V =
R_Z^-1 U`` and ``s = +1`` (update) or ``-1`` (downdate). A feature operator in the place of U is never multiplied out,
and only its k x k congruence with Z is formed: the dual (kernel) form of a posterior precision.

What acts on such a change without its core and weight has files of its own, `low_rank_solves`, `low_rank_roots` and
`low_rank_variances`; how a core is taken away is in `low_rank_core`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating, same_kind, symmetric
from curvlin._tables import CONGRUENCE, lookup
from curvlin._tree import build, static_field, tensor_field
from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.features.base import FeatureOperator
from curvlin.numerics import linear, tall
from curvlin.numerics.implicit import graft
from curvlin.numerics.low_rank import (
    ALWAYS_ORTHONORMAL,
    LowRankFactors,
    from_columns,
    from_gram,
    full_spectrum,
    gram_is_safe,
    leverages,
    symmetric_gram,
)
from curvlin.precision import low_rank_core, low_rank_solves, low_rank_variances
from curvlin.precision.base import PrecisionOperator, exact_operator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.implicit import ImplicitLogdetOperator
from curvlin.precision.low_rank_core import CanonicalFactors
from curvlin.precision.low_rank_roots import ChangedIdentity


@dataclass(eq=False, repr=False, init=False)
class Woodbury(ImplicitLogdetOperator):
    """``base + U core U^T``: any positive definite base, changed in k directions.

    Args:
        base: Z, positive definite where P is solved or sampled.
        U: ``(*batch, D, k)``, or a feature operator Phi standing for ``U = Phi^T`` (k = N R).
        core: C, symmetric ``(*batch, k, k)``, possibly singular or indefinite; the identity when None.

    Raises:
        TypeError, ValueError: if arguments do not fit each other.
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
        exact_operator("base", base)
        batch = check_columns(U, base)
        if core is not None:
            core = symmetric("core", core, like=next(base._tensors())[0])
            if core.shape[-1] != _rank(U):
                raise ValueError(f"core must have {_rank(U)} rows, found shape {tuple(core.shape)}")
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
        return _rank(self.U)

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
            return low_rank_core.canonical(self)
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

    def _rooted(self, factors: Any) -> tuple[Woodbury, LowRankFactors]:
        """This operator without a core, differentiable, for what needs a root of it."""
        if isinstance(factors, LowRankFactors):
            return self, factors
        return low_rank_core.without_core(self, factors), factors.factors

    def _capacitance(self, base_factors: Any) -> Tensor:
        """``H = I + s G C`` with ``G = U^T Z^-1 U``, without a weight, differentiable."""
        change = self.sign * self._gram(base_factors)
        if self.core is not None:
            change = change @ self.core
        return change + torch.eye(self.rank, dtype=change.dtype, device=change.device)

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
        if not isinstance(factors, LowRankFactors) or (
            self.sign < 0 and not low_rank_solves.has_safe_gram(self, factors)
        ):
            return self._energy(solution)
        with torch.no_grad():
            c = self._over_weight(low_rank_solves.coefficients(self._unweighted(), X, factors), 2)
        return self._energy_along(solution, graft(c, self._collect(solution)))

    def _solve_value(self, X: Tensor, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            return factors.operator._solve_value(X, factors.factors)
        return self._over_weight(low_rank_solves.solve(self._unweighted(), X, factors), 2)

    def _inv_quad_value(self, X: Tensor, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            return factors.operator._inv_quad_value(X, factors.factors)
        return self._over_weight(low_rank_solves.inv_quad(self._unweighted(), X, factors), 1)

    def _inv_quad_and_solution(self, X: Tensor, factors: Any) -> tuple[Tensor, Tensor]:
        if isinstance(factors, CanonicalFactors) or self.sign < 0:
            return super()._inv_quad_and_solution(X, factors)
        quad, solution = low_rank_solves.inv_quad_and_solution(self._unweighted(), X, factors)
        return self._over_weight(quad, 1), self._over_weight(solution, 2)

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
        # The factors as well: a kernel with a batch in its tensors alone would count derivatives once per element.
        full, factors = self.expand(self.batch_shape), factors.expand(self.batch_shape)
        if self._is_plain(factors) and factors.Q is not None:
            assert isinstance(full.U, Tensor)
            diagonal = full._inverse_diagonal(factors)
            solved = full._solve(full.U.double(), factors)
            return [
                diagonal.sum(-1) if isinstance(self.base, Isotropic) else diagonal,
                2 * self.sign * solved,
            ]
        structure = full._structure()

        def live(*tensors: Tensor) -> Tensor:
            P: Woodbury = build(structure, tensors)
            if isinstance(factors, CanonicalFactors):
                return low_rank_core.log_det(P, factors)
            return P._base_logdet(factors) + P._unweighted()._live_logdet(factors)

        with torch.enable_grad():
            output, vjp = torch.func.vjp(live, *(t for t, _ in full._tensors()))[:2]
        return list(vjp(torch.ones_like(output)))

    def _logdet_pull_back(self, g: Tensor, factors: Any) -> list[Tensor]:
        """For ``diag(d) + s U U^T``, in one pass over U: ``g diag(P^-1)`` (summed for one d) and ``2 s g P^-1 U``."""
        eager = self._is_concrete() and not torch.is_grad_enabled()
        if not (self._is_plain(factors) and eager) or self.batch_shape:
            return super()._logdet_pull_back(g, factors)
        assert isinstance(self.U, Tensor) and isinstance(self.base, (Diagonal, Isotropic))
        gradient = torch.empty_like(self.U)
        scale = self.base._column().rsqrt()
        leverage = leverages(self.U, scale, factors, out=gradient, weight=2 * self.sign * g)
        diagonal = g * low_rank_variances.from_leverage(self, leverage, factors)
        return [diagonal.sum() if isinstance(self.base, Isotropic) else diagonal, gradient]

    def _is_plain(self, factors: Any) -> bool:
        """Whether P is ``diag(d) + s U U^T`` with a matrix U, and no core or weight."""
        plain = isinstance(self.U, Tensor) and isinstance(factors, LowRankFactors) and self.weight is None
        return plain and isinstance(self.base, (Diagonal, Isotropic))

    def _live_logdet(self, factors: LowRankFactors) -> Tensor:
        """``log det H`` around the accurate spectrum: its derivative ``H^-1 dH`` comes from there."""
        W, h = full_spectrum(factors)
        whitening = W / h.sqrt().unsqueeze(-2)
        inner = whitening.mT @ self._capacitance(factors.base) @ whitening
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        lower = torch.linalg.cholesky_ex(graft(eye.expand_as(inner), inner)).L
        return 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)

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
        return torch.cat([self._energy_of_columns(part) for part in positions.split(width)], dim=-1)

    def _energy_of_columns(self, index: Tensor) -> Tensor:
        """The entries of the diagonal of ``U C U^T`` that `index` names, of features."""
        assert isinstance(self.U, FeatureOperator)
        columns = self.U._columns(index).flatten(-3, -2)
        return (columns * (columns if self.core is None else self.core @ columns)).sum(-2)

    def _inverse_diagonal(self, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            value: Tensor = factors.operator._inverse_diagonal(factors.factors)
            if not self._needs_grad():
                return value
            return graft(value, low_rank_core.inverse_diagonal(self, factors))
        return self._over_weight(low_rank_variances.inverse_diagonal(self._unweighted(), factors), 1)

    # -- roots ------------------------------------------------------------------------------------------------

    def _whiten(self, X: Tensor, factors: Any) -> Tensor:
        return self._by_root(ChangedIdentity.whiten, X, factors)

    def _unwhiten(self, Z: Tensor, factors: Any) -> Tensor:
        return self._by_root(ChangedIdentity.unwhiten, Z, factors, inverse=True)

    def _root_matvec(self, Z: Tensor, factors: Any) -> Tensor:
        return self._by_root(ChangedIdentity.root_matvec, Z, factors)

    def _root_solve(self, G: Tensor, factors: Any) -> Tensor:
        return self._by_root(ChangedIdentity.root_solve, G, factors, inverse=True)

    def _by_root(
        self,
        apply: Callable[[ChangedIdentity, Tensor], Tensor],
        X: Tensor,
        factors: Any,
        *,
        inverse: bool = False,
    ) -> Tensor:
        """`apply` for ``P / w`` without a core, and then ``sqrt(w)``."""
        normal, own_factors, weight = self._rooted_normal(factors)
        value = apply(ChangedIdentity(normal, own_factors), X)
        scale = weight.sqrt()[..., None, None]
        value = value / scale if inverse else value * scale
        if isinstance(factors, CanonicalFactors):
            return low_rank_core.checked_root(self, value, factors)
        return value

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
        root = ChangedIdentity(others._unweighted(), factors).capacitance_root()[1]
        assert isinstance(kept.U, Tensor)
        return kept._with(U=linear.solve(root, kept.U.double().mT).mT.to(self.dtype))

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


def _rank(U: Tensor | FeatureOperator) -> int:
    return U.n_samples * U.n_rows if isinstance(U, FeatureOperator) else U.shape[-1]


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
