"""Predictions at many prior precisions from outputs and features that are computed once.

In the eigenbasis of the curvature the posterior precision is ``lambda_i + delta``. What the features of a `feature_map`
leave out of the prior, ``(kappa - Phi Phi^T) / delta``, is kept at ``delta = 1``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from curvlin import Diagonal, FeatureOperator
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.eigenbasis import Eigenbasis, eigenbasis
from curvlin_nn.evidence import Curvature
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.feature_posterior import FeaturePrior, FeatureSpace
from curvlin_nn.predictive import Predictive
from curvlin_nn.predictive.linearised import FEATURE_BUDGET
from curvlin_nn.prior import Prior
from curvlin_nn.residual import ResidualPredictive

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace


@dataclass(frozen=True)
class Kept:
    """Outputs and features of some samples; stands for an input of `View.la`.

    Attributes:
        outputs: of the model.
        features: over the coordinates of `View.la`.
        left_out: the residual prior covariance at a prior precision of one; None where predictions have none.
    """

    outputs: Float[Tensor, "N C"]
    features: FeatureOperator
    left_out: Float[Tensor, "N C C"] | None = None

    @property
    def entries(self) -> int:
        """How many numbers are kept, besides the outputs."""
        left_out = 0 if self.left_out is None else self.left_out.numel()
        return left_out + sum(t.numel() for t, _ in self.features._tensors())


@dataclass(frozen=True)
class View:
    """A posterior in the eigenbasis of its curvature, where there is one.

    Attributes:
        la: the same posterior over other coordinates, asked with `Kept` in the place of inputs.
        source: the linearisation over the parameters.
        basis: from these to those; None if they are the same.
    """

    la: Laplace
    source: Predictive
    basis: Eigenbasis | None

    @classmethod
    def of(cls, la: Laplace) -> View:
        """That of a fitted object, which stays as it is."""
        fit = la._fit
        H = fit.curvature.scaled(la.sigma_noise.detach(), la.temperature)
        damped = fit.curvature.damped is not None  # then the basis depends on the prior
        basis = None if damped else eigenbasis(H)
        curvature = fit.curvature
        if not damped:
            curvature = _Scaled(H if basis is None else Diagonal(basis.eigenvalues))
        held, features = _Held(H.size), la._features
        residual = features is not None and features.residual and features.stands_in
        source = ResidualPredictive(fit.feature_map, H) if residual else Predictive(fit.feature_map, H)
        seen = copy.copy(la)
        seen._prior_projection = None
        seen._features = _HeldSpace(held, True) if residual else None
        seen._fitted = replace(fit, curvature=curvature, feature_map=held)
        return cls(seen, source, basis)

    def pieces(self, x: Any) -> Iterator[Kept]:
        """Outputs and features over the coordinates of `la`, a bounded number of samples at a time."""
        for piece in self._found(x):
            if self.basis is None:
                yield piece
                continue
            n, n_outputs = piece.outputs.shape
            at_once = max(1, FEATURE_BUDGET // max(1, self.basis.dense * n_outputs))
            for start in range(0, n, at_once):
                some = slice(start, start + at_once)
                left_out = None if piece.left_out is None else piece.left_out[some]
                yield Kept(piece.outputs[some], self.basis.rotated(piece.features[some]), left_out)

    def _found(self, x: Any) -> Iterator[Kept]:
        """Over the coordinates of the source."""
        if not isinstance(self.source, ResidualPredictive):
            yield from (Kept(f, Phi) for f, Phi in self.source._chunks(x))
            return
        for f, Phi, J in self.source._parts(x):
            yield Kept(f, Phi.to(f.dtype), self.source._residual(Phi, J).covariance.to(f.dtype))


class _Held(FeatureMap):
    """Gives back what was kept, over so many coordinates."""

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def __call__(self, x: Kept) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        return x.outputs, x.features


@dataclass(frozen=True)
class _HeldSpace(FeatureSpace):
    """Predictions with the residual that was kept."""

    def predictive(self, precision: PrecisionOperator, prior: Prior, progress_bar: bool) -> Predictive:
        assert isinstance(prior, FeaturePrior)
        return _HeldPredictive(self.feature_map, precision, progress_bar, float(prior.precision.detach()))


@dataclass(frozen=True)
class _HeldPredictive(Predictive):
    """Of each sample alone: between samples no residual is kept."""

    prior_precision: float = 1.0

    def mean_and_covariance(self, x: Kept) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        f, covariance = super().mean_and_covariance(x)
        return f, covariance + self._left_out(x)

    def mean_and_variance(self, x: Kept) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        f, variance = super().mean_and_variance(x)
        return f, variance + self._left_out(x).diagonal(dim1=1, dim2=2)

    def _left_out(self, x: Kept) -> Float[Tensor, "N C C"]:
        assert x.left_out is not None
        return x.left_out / self.prior_precision


@dataclass(frozen=True)
class _Scaled(Curvature):
    """A curvature in which noise and temperature are contained already."""

    def scaled(self, sigma_noise: Float[Tensor, "*C"], temperature: float | Tensor) -> PrecisionOperator:
        return self.total
