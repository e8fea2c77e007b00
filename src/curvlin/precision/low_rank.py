"""Low-rank changes of a precision: ``Z + U C U^T`` for any base Z, and ``diag(d) + U U^T``.

With ``P = Z + s w U U^T`` (s = +1 or -1, w > 0), ``H = I + s w U^T Z^-1 U = L L^T``, ``R_Z R_Z^T = Z`` and
``V = sqrt(w) R_Z^-1 U``, the root of P is ``R = R_Z (I + s V (I + L)^-1 V^T)``, its inverse
``(I - s V (I + L^T)^-1 L^-1 V^T) R_Z^-1``: triangular matrices of size k only, smooth in all that they depend on, and
U enters only as ``U c`` and ``U^T x``. So U may be a feature operator that is never multiplied out; this is then
the dual (kernel) form of a posterior precision. A factorisation costs one congruence with Z and O(k^3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import floating, same_kind, symmetric
from curvlin._tables import CONGRUENCE, lookup
from curvlin._tree import Tree, is_concrete, static_field, tensor_field
from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.features.base import FeatureOperator
from curvlin.numerics.cholesky import follow
from curvlin.numerics.implicit import graft
from curvlin.numerics.low_rank import capacitance_lower, leverage_split
from curvlin.numerics.scaling import power_of_two
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.implicit import ImplicitOperator


@dataclass(frozen=True, eq=False, repr=False)
class LowRankFactors(Tree):
    """L with ``L L^T = I + s w U^T Z^-1 U``, and the factors of Z."""

    base: Any = tensor_field(0)
    lower: Tensor = tensor_field(2)


@dataclass(frozen=True, eq=False, repr=False)
class CanonicalFactors(Tree):
    """An operator without a core that equals the one with it, and its factors."""

    operator: Any = tensor_field(0)
    factors: Any = tensor_field(0)
    definite: bool = static_field()


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Woodbury(ImplicitOperator):
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
        check_columns(U, base)
        if core is not None:
            if isinstance(U, FeatureOperator):
                raise NotClosedError(
                    "a core beside a feature operator is not closed; mix its rows instead: S @ Phi"
                )
            core = symmetric("core", core, like=U)
            if core.shape[-1] != U.shape[-1]:
                raise ValueError(f"core must have {U.shape[-1]} rows, found shape {tuple(core.shape)}")
        self._set(base, U, core, None, 1)

    def _set(self, base: PrecisionOperator, U: Any, core: Any, weight: Any, sign: int) -> None:
        fields = {"base": base, "U": U, "core": core, "weight": weight, "sign": sign}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _with(self, **changes: Any) -> Woodbury:
        """A copy with some fields replaced, unchecked; a changed base makes it a plain `Woodbury`."""
        fields = {name: getattr(self, name) for name in ("base", "U", "core", "weight", "sign")} | changes
        copy: Woodbury = object.__new__(type(self) if isinstance(fields["base"], Diagonal) else Woodbury)
        copy._set(**fields)
        return copy

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
        return self.U @ c

    def _collect(self, X: Tensor) -> Tensor:
        """``U^T X``: ``(..., D, K) -> (..., k, K)``."""
        if isinstance(self.U, FeatureOperator):
            return self.U._matmul(X).flatten(-3, -2)
        return self.U.mT @ X

    def _weighted(self, X: Tensor) -> Tensor:
        """``s w X``."""
        X = X if self.weight is None else self.weight[..., None, None] * X
        return X if self.sign > 0 else -X

    def _capacitance(self, base_factors: Any) -> Tensor:
        """``I + s w U^T Z^-1 U``, differentiable."""
        if isinstance(self.U, FeatureOperator):
            rule = lookup(CONGRUENCE, type(self.U), type(self.base))
            if rule is None:
                raise NotClosedError(
                    f"no exact rule for {type(self.U).__name__} Z^-1 {type(self.U).__name__}^T with Z a "
                    f"{type(self.base).__name__}; use features whose blocks match the base"
                )
            gram = rule(self.U, None, self.base, base_factors, "joint", None).double()
            gram = gram.flatten(-2).flatten(-3, -2)
        else:
            gram = self.U.mT @ self.base._solve(self.U, base_factors)
        gram = self._weighted((gram + gram.mT) / 2)
        return gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)

    def _whitened(self, base_factors: Any) -> Tensor:
        """``V = sqrt(w) R_Z^-1 U``, formed so that a common power-of-two scale of Z and w leaves no trace."""
        assert isinstance(self.U, Tensor)
        if self.weight is None:
            return self.base._root_solve(self.U, base_factors)
        scale = power_of_two(self.weight[..., None, None])
        base = self.base._scale(1 / scale)
        return base._root_solve(self.U, base._factorize()) * (self.weight / scale).sqrt()[..., None, None]

    # -- factorisation ----------------------------------------------------------------------------------------

    def _factorize(self) -> LowRankFactors | CanonicalFactors:
        if self.core is not None:
            return self._canonical()
        try:
            base = self.base._factorize()
        except NotPositiveDefiniteError as error:
            raise error.within("Woodbury.base") from None
        whitened = None if isinstance(self.U, FeatureOperator) else lambda: self._whitened(base)
        lower = capacitance_lower(self._capacitance(base), whitened, self.sign, "Woodbury")
        return LowRankFactors(base, lower)

    def _canonical(self) -> CanonicalFactors:
        """The core as ``E diag(gamma) E^T``, its positive part an update and its negative part a downdate."""
        assert self.core is not None and isinstance(self.U, Tensor)
        lower, info = torch.linalg.cholesky_ex(self.core)
        if bool((info == 0).all()):
            definite = self._with(core=None, U=self.U @ lower)
            return CanonicalFactors(definite, definite._factorize(), True)
        gamma, E = torch.linalg.eigh(self.core)
        columns = self.U @ E
        tiny = gamma.shape[-1] * self.resolution * gamma.abs().amax(-1, keepdim=True)
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
        if not self._needs_grad():
            return factors.operator, factors.factors
        if not factors.definite:
            raise NotClosedError(
                "the root of Woodbury with a singular or indefinite core has no derivative; make the core positive "
                "definite, or detach the operator"
            )
        assert self.core is not None and isinstance(self.U, Tensor)
        return self._with(core=None, U=self.U @ torch.linalg.cholesky_ex(self.core).L), factors.factors

    def _lower(self, factors: LowRankFactors) -> Tensor:
        if not self._needs_grad():
            return factors.lower
        return follow(factors.lower, self._capacitance(factors.base))

    # -- products, solves, determinants -----------------------------------------------------------------------

    def _matmul(self, X: Tensor) -> Tensor:
        c = self._collect(X)
        return self.base._matmul(X) + self._spread(self._weighted(c if self.core is None else self.core @ c))

    def _solve_value(self, X: Tensor, factors: Any) -> Tensor:
        if isinstance(factors, CanonicalFactors):
            return factors.operator._solve_value(X, factors.factors)
        x = self._solve_once(X, factors)
        # One step of refinement repairs the digits that a right-hand side near the range of U loses.
        return x + self._solve_once(X - self._matmul(x), factors)

    def _solve_once(self, X: Tensor, factors: LowRankFactors) -> Tensor:
        return self.base._solve(
            X - self._spread(self._weighted(self._coefficients(X, factors))), factors.base
        )

    def _coefficients(self, X: Tensor, factors: LowRankFactors) -> Tensor:
        """``H^-1 U^T Z^-1 X = U^T P^-1 X``."""
        c = self._collect(self.base._solve(X, factors.base))
        lower = factors.lower.expand(*torch.broadcast_shapes(factors.lower.shape[:-2], c.shape[:-2]), -1, -1)
        return torch.cholesky_solve(c.expand(*lower.shape[:-2], -1, -1), lower)

    def _inv_quad_value(self, X: Tensor, factors: Any) -> Tensor:
        """``|y|^2_Z + w |t|^2``: the minimum of a least-squares problem, so errors in t count only squared."""
        if isinstance(factors, CanonicalFactors):
            return factors.operator._inv_quad_value(X, factors.factors)
        if self.sign < 0:
            return self._root_solve_value(X, factors).square().sum(-2)
        t = self._coefficients(X, factors)
        fit = t.square().sum(-2) if self.weight is None else self.weight[..., None] * t.square().sum(-2)
        return self.base._inv_quad(X - self._spread(self._weighted(t)), factors.base) + fit

    def _logdet(self, factors: Any) -> Tensor:
        if isinstance(factors, LowRankFactors):
            pivots = self._lower(factors).diagonal(dim1=-2, dim2=-1)
            return self.base._logdet(factors.base) + 2 * pivots.log().sum(-1)
        value = factors.operator._logdet(factors.factors)
        if not self._needs_grad():
            return value
        return self._core_logdet(value, factors)

    def _core_logdet(self, value: Tensor, factors: CanonicalFactors) -> Tensor:
        """The derivatives of ``logdet Z + logdet(I + G C)``: no root of the core, which may be singular."""
        assert self.core is not None and isinstance(self.U, Tensor)
        base_factors = factors.factors.base
        if (
            factors.operator.sign != self.sign
        ):  # the negative part of the core stands outside its positive part
            base_factors = base_factors.base
        gram = self.U.mT @ self.base._solve(self.U, base_factors)
        M = self._weighted(gram @ self.core) + torch.eye(self.rank, dtype=gram.dtype, device=gram.device)
        return graft(value, self.base._logdet(base_factors) + torch.linalg.slogdet(M).logabsdet)

    def _diagonal(self) -> Tensor:
        return self.base._diagonal() + self._weighted(self._low_rank_diagonal().unsqueeze(-1)).squeeze(-1)

    def _low_rank_diagonal(self) -> Tensor:
        """The diagonal of ``U C U^T``."""
        if isinstance(self.U, Tensor):
            columns = self.U if self.core is None else self.U @ self.core
            return (columns * self.U).sum(-1)
        return _by_chunks(self.U, lambda columns: columns.square().sum((-3, -2)))

    def _inverse_diagonal(self, factors: Any) -> Tensor:
        P, factors = self._rooted(factors)
        lower = P._lower(factors)
        if isinstance(P.U, Tensor):
            plain = isinstance(P.base, (Diagonal, Isotropic)) and P.sign > 0 and not P.batch_shape
            if plain and is_concrete(P.U) and not P._needs_grad():
                return leverage_split(P.base.diagonal(), P._whitened(factors.base), lower)
            removed = torch.linalg.solve_triangular(lower, P.base._solve(P.U, factors.base).mT, upper=False)
            gain = removed.square().sum(-2)
        else:
            gain = P._feature_gain(lower, factors.base)
        return P.base._inverse_diagonal(factors.base) - P._weighted(gain.unsqueeze(-1)).squeeze(-1)

    def _feature_gain(self, lower: Tensor, base_factors: Any) -> Tensor:
        """The diagonal of ``Z^-1 U H^-1 U^T Z^-1``, a chunk of k right-hand sides at a time."""
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        coefficients = torch.linalg.solve_triangular(lower.mT, eye.expand_as(lower), upper=True)
        width = max(1, _CHUNK // self.size)
        total: Tensor | float = 0.0
        for part in coefficients.split(width, dim=-1):
            total = total + self.base._solve(self._spread(part), base_factors).square().sum(-1)
        assert isinstance(total, Tensor)
        return total

    # -- roots ------------------------------------------------------------------------------------------------

    def _whiten(self, X: Tensor, factors: Any) -> Tensor:
        P, factors = self._rooted(factors)
        c = torch.linalg.solve_triangular(_plus_identity(P._lower(factors)).mT, P._collect(X), upper=True)
        return P.base._whiten(X, factors.base) + P.base._root_solve(P._spread(P._weighted(c)), factors.base)

    def _unwhiten(self, Z: Tensor, factors: Any) -> Tensor:
        P, factors = self._rooted(factors)
        lower = P._lower(factors)
        u = P.base._unwhiten(Z, factors.base)
        c = torch.linalg.solve_triangular(_plus_identity(lower), P._collect(u), upper=False)
        c = torch.linalg.solve_triangular(lower.mT, c, upper=True)
        return u - P.base._solve(P._spread(P._weighted(c)), factors.base)

    def _root_matvec(self, Z: Tensor, factors: Any) -> Tensor:
        P, factors = self._rooted(factors)
        c = P._collect(P.base._unwhiten(Z, factors.base))
        c = torch.linalg.solve_triangular(_plus_identity(P._lower(factors)), c, upper=False)
        return P.base._root_matvec(Z, factors.base) + P._spread(P._weighted(c))

    def _root_solve(self, G: Tensor, factors: Any) -> Tensor:
        P, factors = self._rooted(factors)
        return P._root_solve_value(G, LowRankFactors(factors.base, P._lower(factors)))

    def _root_solve_value(self, G: Tensor, factors: LowRankFactors) -> Tensor:
        lower = factors.lower
        c = torch.linalg.solve_triangular(
            lower, self._collect(self.base._solve(G, factors.base)), upper=False
        )
        c = torch.linalg.solve_triangular(_plus_identity(lower).mT, c, upper=True)
        return self.base._root_solve(G - self._spread(self._weighted(c)), factors.base)

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
        """With Z = Z_A + Z_B without coupling: ``Z_A + U_A (C^-1 + U_B^T Z_B^-1 U_B)^-1 U_A^T``."""
        if self.core is not None or isinstance(self.U, FeatureOperator) or self.sign < 0:
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
        lower = others._lower(factors).to(self.dtype)
        return kept._with(U=torch.linalg.solve_triangular(lower, kept.U.mT, upper=False).mT)

    def _to_dense(self) -> Tensor:
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        columns = self._spread(eye)
        low_rank = (columns if self.core is None else columns @ self.core) @ columns.mT
        return self.base.to_dense() + self._weighted(low_rank)


@dataclass(frozen=True, eq=False, repr=False, init=False)
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


_CHUNK = 2**22
"""Numbers formed at a time where a feature operator's columns are needed: 32 MiB in float64."""


def _by_chunks(features: FeatureOperator, reduce: Any) -> Tensor:
    """A function of the columns of a feature operator, a chunk of coordinates at a time: ``(..., D)``."""
    width = max(1, _CHUNK // (features.n_samples * features.n_rows))
    positions = torch.arange(features.size, device=features.device)
    return torch.cat([reduce(features._columns(part)) for part in positions.split(width)], dim=-1)


def _plus_identity(lower: Tensor) -> Tensor:
    return lower + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)


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


def check_columns(U: object, base: PrecisionOperator) -> None:
    """U is ``(..., D, k)``, or features over D coordinates, of the base's dtype and device."""
    like = next(base._tensors())[0]
    if isinstance(U, FeatureOperator):
        if U.size != base.size:
            raise ValueError(f"U must have {base.size} features per row, found shape {tuple(U.shape)}")
        same_kind("U", next(U._tensors())[0], like)
        return
    columns = floating("U", U, ndim=2, like=like)
    if columns.shape[-2] != base.size or columns.shape[-1] == 0:
        raise ValueError(f"U must have shape (..., {base.size}, k) with k >= 1, found {tuple(columns.shape)}")


def low_rank_update(P: PrecisionOperator, U: Tensor | FeatureOperator, sign: int) -> PrecisionOperator:
    """``P + s U U^T`` in the simplest type that holds it exactly."""
    check_columns(U, P)
    if isinstance(P, Dense):
        change = Woodbury(Dense(torch.zeros_like(P.matrix)), U)._to_dense()
        return Dense(P.matrix + sign * change)
    if sign > 0 and isinstance(U, Tensor):
        if isinstance(P, (Isotropic, Diagonal)):
            return LowRankPlusDiag(P.diagonal(), U)
        if isinstance(P, Woodbury) and P.sign > 0 and P.core is None and isinstance(P.U, Tensor):
            return P._with(U=joined_columns(unit_weight(P), U), weight=None)
    changed = Woodbury(P, U)
    return changed if sign > 0 else changed._with(sign=-1)


def unit_weight(P: Woodbury) -> Tensor:
    """The columns ``sqrt(w) U`` of an update by a tensor."""
    assert isinstance(P.U, Tensor)
    return P.U if P.weight is None else P.U * P.weight.sqrt()[..., None, None]


def joined_columns(first: Tensor, second: Tensor) -> Tensor:
    """Columns side by side, batch dimensions broadcast."""
    batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return torch.cat([t.expand(*batch, *t.shape[-2:]) for t in (first, second)], dim=-1)
