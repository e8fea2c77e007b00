"""Gaussians held by their precision (or, where it may be singular, by their covariance)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl
from torch.utils import _pytree as pytree

from curvlin._check import broadcastable, floating, same_kind
from curvlin._random import standard_normal
from curvlin._tree import common_shape, hide_from_compiler
from curvlin.algebra.divergence import shape_divergence
from curvlin.covariance import Covariance, precision_quad
from curvlin.features.base import FeatureOperator, same_features
from curvlin.index import Index, as_index
from curvlin.numerics.implicit import graft
from curvlin.observation import observation_noise
from curvlin.precision.base import PrecisionOperator, exact_operator
from curvlin.precision.low_rank import Woodbury

if TYPE_CHECKING:
    from torch.distributions import MultivariateNormal

    from curvlin.interop.gpytorch import StructuredMVN

_LOG_2PI = math.log(2 * math.pi)


@hide_from_compiler
class Gaussian(Distribution):
    """``N(mean, precision^-1)`` over the last dimension, in the structure of the precision.

    Batch dimensions of the mean and of the precision broadcast. Every method is differentiable in both.

    Args:
        mean: ``(*batch, D)``.
        precision: a precision operator of size D.
        validate_args: as in `torch.distributions`; shapes are checked in any case.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes do not match.
    """

    arg_constraints = {"mean": constraints.real_vector}  # noqa: RUF012  (torch's own declaration)
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        mean: Float[Tensor, "*batch D"],
        precision: PrecisionOperator,
        *,
        validate_args: bool | None = None,
    ) -> None:
        exact_operator("precision", precision, "wrap a matrix in Dense, or use Gaussian.from_covariance")
        self._init(mean, Covariance(precision), "precision", validate_args)

    @classmethod
    def from_covariance(
        cls,
        mean: Float[Tensor, "*batch D"],
        covariance: Float[Tensor, "*batch D D"] | Covariance,
        *,
        validate_args: bool | None = None,
    ) -> Gaussian:
        """``N(mean, C)`` with a covariance that may be singular.

        A degenerate Gaussian has a mean, variances, samples and marginals; `log_prob`, `entropy` and
        `precision` raise `NotPositiveDefiniteError`.

        Args:
            mean: ``(*batch, D)``.
            covariance: a symmetric positive semidefinite matrix, or a `Covariance`.
            validate_args: as in `torch.distributions`.
        """
        if isinstance(covariance, PrecisionOperator):
            raise TypeError(
                f"covariance must be a matrix or a Covariance, found the precision "
                f"{type(covariance).__name__}; use Gaussian(mean, precision), or Covariance.of(operator) if "
                "the operator is the covariance itself"
            )
        if not isinstance(covariance, Covariance):
            covariance = Covariance.of(covariance)
        gaussian = cls.__new__(cls)
        gaussian._init(mean, covariance, "covariance", validate_args)
        return gaussian

    @classmethod
    def _rebuild(cls, mean: Any, covariance: Any, *, validate_args: Any = None) -> Gaussian:
        """Without checks, for pytrees, which put anything in the place of tensors."""
        new = cls.__new__(cls)
        new._mean, new._covariance = mean, covariance
        if validate_args is not None:
            new._validate_args = validate_args
        if isinstance(mean, Tensor):
            new._batch_shape, new._event_shape = mean.shape[:-1], mean.shape[-1:]
        return new

    def _init(self, mean: Tensor, covariance: Covariance, name: str, validate_args: bool | None) -> None:
        floating("mean", mean, ndim=1, like=next(covariance._tensors())[0])
        if mean.shape[-1] != covariance.size:
            raise ValueError(
                f"mean must have {covariance.size} entries like the {name}, found shape {tuple(mean.shape)}"
            )
        self._covariance = covariance
        batch = broadcastable("mean", mean.shape[:-1], covariance.batch_shape)
        self._mean = mean.expand(*batch, mean.shape[-1])
        # Values are checked above, in one line and not inside transforms, so torch's own check is left out.
        super().__init__(batch, mean.shape[-1:], validate_args=False)
        if validate_args is None:
            del self._validate_args  # the class-wide default counts again
        else:
            self._validate_args = validate_args

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Float[Tensor, "*batch D"]:
        """The mean."""
        return self._mean

    @property
    def mode(self) -> Float[Tensor, "*batch D"]:
        """The mean."""
        return self._mean

    @property
    def precision(self) -> PrecisionOperator:
        """The precision operator.

        Raises:
            NotPositiveDefiniteError: if the Gaussian is degenerate.
        """
        return self._covariance.inverse()

    @property
    def covariance(self) -> Covariance:
        """The covariance."""
        return self._covariance

    @property
    def variance(self) -> Float[Tensor, "*batch D"]:
        """The variances of the coordinates."""
        return self._covariance.diagonal().expand(self._mean.shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self._mean.shape))
        return f"Gaussian({shape}, {self._covariance!r})"

    def expand(self, batch_shape: Sequence[int], _instance: Gaussian | None = None) -> Gaussian:
        """The same Gaussian with a larger batch, nothing copied."""
        new: Gaussian = self._get_checked_instance(Gaussian, _instance)  # type: ignore[no-untyped-call]
        mean = self._mean.expand(*batch_shape, self._mean.shape[-1])
        new._init(mean, self._covariance, "covariance", self.__dict__.get("_validate_args"))
        return new

    # -- densities and draws ---------------------------------------------------------------------------------

    def log_prob(self, value: Float[Tensor, "*sample *batch D"]) -> Float[Tensor, "*sample *batch"]:
        """The log density.

        Raises:
            ValueError: if the shape of `value` does not end in (or broadcast with) that of a draw.
            NotPositiveDefiniteError: if the Gaussian is degenerate.
        """
        floating("value", value, ndim=1, like=self._mean)
        self._must_broadcast("value", value, self._mean.shape)
        quad, logdet = self._covariance._inv_quad_and_logdet(value - self._mean)
        return (-0.5 * (quad + logdet + self._mean.shape[-1] * _LOG_2PI)).to(self._mean.dtype)

    def rsample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Float[Tensor, "*sample *batch D"]:
        """Draws, differentiable in mean and precision.

        Args:
            sample_shape: leading shape of the draws.
            generator: source of randomness; None is torch's default generator.
        """
        noise = standard_normal(sample_shape, self._mean.shape, generator, self._mean)
        return self._mean + self._covariance.colour(noise)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Float[Tensor, "*sample *batch D"]:
        """Draws without gradient; see `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """``(log det C + D log(2 pi e)) / 2``."""
        logdet = self._covariance.logdet()
        return (0.5 * (logdet + self._mean.shape[-1] * (1 + _LOG_2PI))).expand(self.batch_shape)

    def _must_broadcast(self, name: str, value: Tensor, shape: torch.Size) -> None:
        same_end = value.ndim > 0 and value.shape[-1] == shape[-1]
        if not same_end or common_shape(value.shape, shape) is None:
            expected = f"(..., {', '.join(map(str, shape))})"
            raise ValueError(f"{name} must have shape {expected}, found {tuple(value.shape)}")

    # -- parts -----------------------------------------------------------------------------------------------

    def marginal(self, index: Index, *, max_size: int = 2048) -> Gaussian:
        """The distribution of the coordinates `index`, in that order, the others integrated out.

        Raises:
            NotClosedError: if the structure is not closed and there are more than `max_size` coordinates.
        """
        indices = as_index(index, self._mean.shape[-1], self._mean.device)
        return Gaussian.from_covariance(
            self._mean[..., indices], self._covariance.marginal(indices, max_size=max_size)
        )

    def conditional(
        self, index: Index, value: Float[Tensor, "*batch D-k"], *, max_size: int = 2048
    ) -> Gaussian:
        """The distribution of the coordinates `index`, in that order, given the values of all the others.

        With a = `index` and b the other coordinates, ``N(mean_a - P_aa^-1 P_ab (value - mean_b), P_aa^-1)``.

        Args:
            index: a, the coordinates that stay random (as in `PrecisionOperator.conditional`).
            value: of the other coordinates, in increasing order, ``(..., D - k)``.
            max_size: the most coordinates for which a dense P_aa may be made.

        Raises:
            NotClosedError: if the structure is not closed and there are more than `max_size` coordinates.
            NotPositiveDefiniteError: if the Gaussian is degenerate.
        """
        size = self._mean.shape[-1]
        indices = as_index(index, size, self._mean.device)
        held = torch.ones(size, dtype=torch.bool, device=indices.device)
        held[indices] = False
        rest = held.nonzero().squeeze(-1)
        floating("value", value, ndim=1, like=self._mean)
        self._must_broadcast("value", value, torch.Size([*self.batch_shape, len(rest)]))
        P = self.precision
        deviation = value - self._mean[..., rest]
        # P_ab v is read off a product with P, so that nothing of size k x (D - k) is formed.
        whole = torch.zeros(*deviation.shape[:-1], size, dtype=deviation.dtype, device=deviation.device)
        whole = whole.index_copy(-1, rest, deviation)
        coupling = P._matmul(whole.unsqueeze(-1)).squeeze(-1)[..., indices]
        P_aa = P.conditional(indices, max_size=max_size)
        mean = self._mean[..., indices] - P_aa.solve(coupling.unsqueeze(-1)).squeeze(-1)
        return Gaussian(mean, P_aa)

    # -- linear maps and observations ------------------------------------------------------------------------

    def push_forward(
        self,
        Phi: Float[Tensor, "... R D"] | FeatureOperator,
        offset: Tensor | None = None,
        center: Float[Tensor, "... D"] | None = None,
        *,
        joint: bool = False,
    ) -> Gaussian:
        """The distribution of ``offset + Phi (x - center)``, which may be degenerate.

        Args:
            Phi: rows ``(..., R, D)``, or a feature operator ``(N, R, D)``.
            offset: ``(..., R)`` or ``(N, R)``; zero when None.
            center: ``(..., D)``; zero when None.
            joint: for a feature operator, one Gaussian over all ``N R`` outputs (sample-major) instead of one
                over R outputs for each sample.

        Returns:
            A Gaussian held by its covariance; for a feature operator of batch shape ``(..., N)`` and event
            shape ``(R,)`` (event shape ``(N R,)`` if joint).

        Raises:
            NotClosedError: if the kinds of features and operator have no exact rule.
        """
        deviation = self._mean
        if center is not None:
            floating("center", center, like=self._mean)
            self._must_broadcast("center", center, self._mean.shape)
            deviation = self._mean - center
        mean = _applied(Phi, deviation)
        if offset is not None:
            floating("offset", offset, like=self._mean)
            self._must_broadcast("offset", offset, mean.shape)
            mean = mean + offset
        covariance = self._covariance.congruence(Phi, joint=joint and not isinstance(Phi, Tensor))
        if joint and not isinstance(Phi, Tensor):
            mean, covariance = mean.flatten(-2), covariance.flatten(-2).flatten(-3, -2)
        return Gaussian.from_covariance(mean, covariance)

    def condition(
        self,
        Phi: Float[Tensor, "... R D"] | FeatureOperator,
        y: Tensor,
        noise_precision: float | Tensor | PrecisionOperator,
        offset: Tensor | None = None,
    ) -> tuple[Gaussian, Float[Tensor, "*batch"]]:
        """The posterior of x given ``y = offset + Phi x + noise``, and the log evidence of y.

        With Lambda the precision of the noise and n the number of rows,

            P'        = P + Phi^T Lambda Phi
            mean'     = mean + P'^-1 Phi^T Lambda (y - offset - Phi mean)
            log p(y)  = (log det Lambda + log det P - log det P' - q - n log 2 pi) / 2
            q         = |y - offset - Phi mean'|^2_Lambda + |mean' - mean|^2_P

        where q is a sum of squares, not a difference of large terms.

        Args:
            Phi: rows ``(..., R, D)``, or a feature operator ``(N, R, D)`` for N samples observed together.
            y: ``(..., R)``, or ``(..., N, R)`` for a feature operator.
            noise_precision: one positive number; positive numbers that broadcast to y; or for rows that share
                noise, a positive definite matrix ``(R, R)`` (``(N, R, R)``) or an operator of size R.
            offset: like y; zero when None.

        Raises:
            TypeError, ValueError: if shapes, dtypes or signs do not fit.
            NotClosedError: if the posterior precision has no structured form.
            NotPositiveDefiniteError: if this Gaussian, or the noise, is degenerate.
        """
        predicted = _applied(Phi, self._mean)
        rows = (
            torch.Size([Phi.n_samples, Phi.n_rows]) if isinstance(Phi, FeatureOperator) else Phi.shape[-2:-1]
        )
        floating("y", y, ndim=len(rows), like=self._mean)
        if y.shape[y.ndim - len(rows) :] != rows:
            raise ValueError(f"y must have shape (..., {', '.join(map(str, rows))}), found {tuple(y.shape)}")
        self._must_broadcast("y", y, predicted.shape)
        residual = y.double() - predicted.double()
        if offset is not None:
            floating("offset", offset, like=self._mean)
            self._must_broadcast("offset", offset, residual.shape)
            residual = residual - offset.double()
        noise = observation_noise(noise_precision, y, rows)

        prior = self.precision
        weighted_rows, weighted = noise.mix(Phi), noise.whiten(residual).unsqueeze(-1)
        updated = prior.update(weighted_rows.mT if isinstance(weighted_rows, Tensor) else weighted_rows)
        P, factors = updated._factored()
        S_Phi = weighted_rows.to(torch.float64)
        shift = P._solve(
            S_Phi.mT @ weighted if isinstance(S_Phi, Tensor) else S_Phi._rmatmul(weighted), factors
        )
        fitted = S_Phi @ shift if isinstance(S_Phi, Tensor) else S_Phi._matmul(shift)
        misfit = (weighted - fitted).squeeze(-1).square().sum(tuple(range(-len(rows), 0)))
        if isinstance(P, Woodbury) and not isinstance(prior, Woodbury):
            penalty = precision_quad(P.base, factors.base, shift)
            gain = _determinant_lemma(P, factors)
        else:
            before, before_factors = prior._factored()
            penalty = precision_quad(before, before_factors, shift)
            gain = P._logdet(factors) - before._logdet(before_factors)
        evidence = 0.5 * (noise.logdet - rows.numel() * _LOG_2PI - gain - misfit - penalty.squeeze(-1))
        mean = self._mean + shift.squeeze(-1).to(self._mean.dtype)
        return Gaussian(mean, updated), evidence.to(self._mean.dtype)

    def to_gpytorch(self) -> StructuredMVN:
        """A `gpytorch.distributions.MultivariateNormal` of the same structure, exact at every size."""
        from curvlin.interop.gpytorch import StructuredMVN

        return StructuredMVN.of(self)

    @classmethod
    def from_gpytorch(cls, mvn: MultivariateNormal) -> Gaussian:
        """A multivariate normal of gpytorch (or torch) whose covariance has a structure of ours.

        Raises:
            NotClosedError: if its covariance has another structure.
            TypeError: if it is no multivariate normal over vectors.
        """
        from curvlin.interop.gpytorch import as_gaussian

        return as_gaussian(mvn)


@register_kl(Gaussian, Gaussian)  # type: ignore[untyped-decorator]
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _kl(p: Gaussian, q: Gaussian) -> Float[Tensor, "*batch"]:
    """``KL(p | q)``; 0 for equal arguments, never negative, and exact to relative rounding where it is small.

    Raises:
        NotClosedError: if the two structures share no exact form.
        NotPositiveDefiniteError: if an argument is degenerate.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(f"q must have event shape {tuple(p.event_shape)}, found {tuple(q.event_shape)}")
    same_kind("q", q.mean, p.mean)
    batch = broadcastable("q", q.batch_shape, p.batch_shape)
    inverted = q.covariance.inverted
    operator = q.covariance.operator if inverted else q.covariance._regular()
    theirs = Covariance(operator.factor(), inverted)
    if p.covariance.inverted or inverted:
        shape = shape_divergence(p.precision, theirs.inverse())
    else:  # eig(P^-1 Q) = eig(C_q^-1 C_p)
        shape = shape_divergence(theirs.operator, p.covariance._regular())
    distance, _ = theirs._inv_quad_and_logdet(p.mean - q.mean)
    return (0.5 * (shape + distance)).to(p.mean.dtype).expand(batch)


# Gaussians travel through torch.func and torch.utils._pytree like operators do.
pytree.register_pytree_node(
    Gaussian,
    lambda g: ([g._mean, g._covariance], g.__dict__.get("_validate_args")),
    lambda children, validate_args: Gaussian._rebuild(*children, validate_args=validate_args),
    serialized_type_name="curvlin.gaussian.Gaussian",
)


# -- arguments -----------------------------------------------------------------------------------------------


def _determinant_lemma(P: Woodbury, factors: Any) -> Tensor:
    """``log det P - log det Z`` for ``P = Z + U U^T``, in which nothing of the size of D cancels."""
    normal, factors, _ = P._rooted_normal(factors)
    value = torch.log1p(factors.gain).sum(-1)
    return graft(value, normal._live_logdet(factors)) if P._needs_grad() else value


def _applied(Phi: Tensor | FeatureOperator, v: Tensor) -> Tensor:
    """``Phi v`` for vectors ``(..., D)``."""
    if isinstance(Phi, FeatureOperator):
        same_features("Phi", Phi, v.shape[-1], v, v.shape[:-1])
        return Phi._matmul(v.unsqueeze(-1)).squeeze(-1)
    rows = floating("Phi", Phi, ndim=2, like=v)
    if rows.shape[-1] != v.shape[-1]:
        raise ValueError(f"Phi must have shape (..., R, {v.shape[-1]}), found {tuple(rows.shape)}")
    broadcastable("Phi", rows.shape[:-2], v.shape[:-1])
    return (rows @ v.unsqueeze(-1)).squeeze(-1)
