"""Variances at many prior precisions from features that are computed once.

In the eigenbasis of the curvature the posterior precision is ``lambda_i + delta``, diagonal: a batch of precisions is
one diagonal for each, and features are multiplied out once for all of them. What the features of a `feature_map` leave
out of the prior, ``(kappa - Phi Phi^T) / delta``, is kept at ``delta = 1``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from curvlin import Diagonal, FeatureOperator
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.eigenbasis import Eigenbasis, eigenbasis
from curvlin_nn.feature_maps.alignment import aligned
from curvlin_nn.predictive import Predictive
from curvlin_nn.predictive.linearised import FEATURE_BUDGET
from curvlin_nn.residual import ResidualPredictive

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace

SPREAD_BUDGET = 2**22
"""Entries of the covariances that are known at once: 32 MiB."""


@dataclass(frozen=True)
class Kept:
    """Outputs and features of some samples.

    Attributes:
        outputs: of the model, flat.
        output_shape: of one sample.
        features: over the coordinates of the posterior, or in the eigenbasis of its curvature.
        left_out: the residual prior covariance at a prior precision of one; None where predictions have none.
    """

    outputs: Float[Tensor, "N C"]
    output_shape: tuple[int, ...]
    features: FeatureOperator
    left_out: Float[Tensor, "N C C"] | None = None

    @property
    def entries(self) -> int:
        """How many numbers are kept, besides the outputs."""
        left_out = 0 if self.left_out is None else self.left_out.numel()
        return left_out + sum(t.numel() for t, _ in self.features._tensors())


@dataclass(frozen=True)
class View:
    """A linearised posterior whose scalar prior precision varies.

    Attributes:
        la: the posterior.
        source: the linearisation over its coordinates.
        basis: from these to the eigenbasis of its curvature, where there is one that no prior changes.
    """

    la: Laplace
    source: Predictive
    basis: Eigenbasis | None

    @classmethod
    def of(cls, la: Laplace) -> View:
        """That of a fitted object, which stays as it is."""
        fit, features = la._fit, la._features
        H = fit.curvature.scaled(la.sigma_noise.detach(), la.temperature)
        residual = features is not None and features.residual and features.stands_in
        source = ResidualPredictive(fit.feature_map, H) if residual else Predictive(fit.feature_map, H)
        return cls(la, source, None if fit.curvature.damped is not None else eigenbasis(H))

    def pieces(self, x: Any) -> Iterator[Kept]:
        """Outputs and features of a batch, a bounded number of samples at a time."""
        for piece in self._found(x):
            if self.basis is None:
                yield piece
                continue
            n, n_outputs = piece.outputs.shape
            at_once = max(1, FEATURE_BUDGET // max(1, self.basis.dense * n_outputs))
            for start in range(0, n, at_once):
                some = slice(start, start + at_once)
                left_out = None if piece.left_out is None else piece.left_out[some]
                rotated = self.basis.rotated(piece.features[some])
                yield Kept(piece.outputs[some], piece.output_shape, rotated, left_out)

    def _found(self, x: Any) -> Iterator[Kept]:
        """Over the coordinates of the posterior."""
        if not isinstance(self.source, ResidualPredictive):
            yield from (Kept(f, self._output_shape(), Phi) for f, Phi in self.source._chunks(x))
            return
        for f, Phi, J in self.source._parts(x):
            left_out = self.source._residual(Phi, J).covariance.to(f.dtype)
            yield Kept(f, self._output_shape(), Phi.to(f.dtype), left_out)

    def _output_shape(self) -> tuple[int, ...]:
        """Of one sample of what was computed last."""
        return self.la._fit.output_shape(self.la.likelihood)

    def spreads(self, piece: Kept, precisions: Float[Tensor, " G"], *, variances: bool) -> Iterator[Tensor]:
        """The covariances ``(N, C, C)`` of the outputs at each precision, or the variances ``(N, C)``."""
        left_out = piece.left_out
        if left_out is not None and variances:
            left_out = left_out.diagonal(dim1=1, dim2=2)
        for P, some in self._posteriors(piece, precisions, variances):
            Phi = aligned(piece.features, P)
            found = P.inv_congruence_diagonal(Phi) if variances else P.inv_congruence(Phi)
            for spread, delta in zip(found if P.batch_shape else [found], some, strict=True):
                yield spread if left_out is None else spread + left_out / delta

    def _posteriors(
        self, piece: Kept, precisions: Float[Tensor, " G"], variances: bool
    ) -> Iterator[tuple[PrecisionOperator, list[float]]]:
        """Posterior precisions, as many in a batch as `SPREAD_BUDGET` allows, with the prior's."""
        dtype = piece.outputs.dtype
        if self.basis is None:
            at = copy.copy(self.la)
            at._prior_projection = None  # which a scalar prior does not need
            for delta in precisions.tolist():
                at.prior_precision = delta
                yield at.posterior_precision, [delta]
            return
        entries = piece.outputs.numel() * (1 if variances else piece.outputs.shape[1])
        eigenvalues = self.basis.eigenvalues
        for some in precisions.split(max(1, SPREAD_BUDGET // max(1, entries))):
            P = Diagonal(eigenvalues + some.to(eigenvalues).unsqueeze(-1))
            yield P.factor(dtype), some.tolist()
