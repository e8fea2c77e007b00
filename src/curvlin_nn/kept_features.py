"""Variances at many prior precisions from features that are computed once.

In the eigenbasis of the curvature the posterior precision is ``lambda_i + delta``, diagonal: a batch of precisions is
one diagonal for each, and features are multiplied out once for all of them. Where there is no such basis, the posterior
is factored once for each precision, and asked about all features that are at hand. What the features of a `feature_map`
leave out of the prior, ``(kappa - Phi Phi^T) / delta``, is kept at ``delta = 1``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
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


class AtPrecisions:
    """A fitted object at one scalar prior precision after another, factored anew only where that changes.

    Args:
        la: the object, which stays as it is.
    """

    def __init__(self, la: Laplace) -> None:
        self._la, self._precision = copy.copy(la), math.nan
        self._la._prior_projection = None  # which a scalar prior does not need

    def __call__(self, precision: float) -> Laplace:
        """The object at this precision, until the next call."""
        if precision != self._precision:
            self._la.prior_precision = self._precision = precision
        return self._la


@dataclass(frozen=True)
class View:
    """A linearised posterior whose scalar prior precision varies.

    Attributes:
        la: the posterior.
        at: the same at a precision.
        source: the linearisation over its coordinates.
        basis: from these to the eigenbasis of its curvature, where there is one that no prior changes.
    """

    la: Laplace
    at: AtPrecisions
    source: Predictive
    basis: Eigenbasis | None

    @classmethod
    def of(cls, la: Laplace) -> View:
        """That of a fitted object, which stays as it is."""
        fit, features = la._fit, la._features
        H = fit.curvature.scaled(la.sigma_noise.detach(), la.temperature)
        residual = features is not None and features.residual and features.stands_in
        source = ResidualPredictive(fit.feature_map, H) if residual else Predictive(fit.feature_map, H)
        basis = None if fit.curvature.damped is not None else eigenbasis(H)
        return cls(la, AtPrecisions(la), source, basis)

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

    def spreads(
        self, pieces: Sequence[Kept], precisions: Float[Tensor, " G"], *, variances: bool
    ) -> Iterator[Iterator[Tensor]]:
        """At each precision the covariances ``(n, C, C)`` of the outputs of each piece, or the variances ``(n, C)``.

        They are made when they are asked for, in this order.
        """
        if self.basis is None:
            for delta in precisions.split(1):
                P = self.at(float(delta)).posterior_precision
                yield (_spread(piece, P, delta, variances)[0] for piece in pieces)
            return
        found = [self._in_basis(self.basis, piece, precisions, variances) for piece in pieces]
        for _ in precisions:
            yield map(next, found)

    @staticmethod
    def _in_basis(
        basis: Eigenbasis, piece: Kept, precisions: Float[Tensor, " G"], variances: bool
    ) -> Iterator[Tensor]:
        """Those of one piece at each precision, as many at once as `SPREAD_BUDGET` allows."""
        entries = piece.outputs.numel() * (1 if variances else piece.outputs.shape[1])
        for some in precisions.split(max(1, SPREAD_BUDGET // max(1, entries))):
            P = Diagonal(basis.eigenvalues + some.to(basis.eigenvalues).unsqueeze(-1))
            yield from _spread(piece, P.factor(piece.outputs.dtype), some, variances)


def _spread(
    piece: Kept, P: PrecisionOperator, precisions: Float[Tensor, " g"], variances: bool
) -> Float[Tensor, "g N C"] | Float[Tensor, "g N C C"]:
    """Variances or covariances by a posterior precision, or by a batch of them, one for each of the prior."""
    Phi = aligned(piece.features, P)
    found = P.inv_congruence_diagonal(Phi) if variances else P.inv_congruence(Phi)
    found = found if P.batch_shape else found.unsqueeze(0)
    if piece.left_out is None:
        return found
    left_out = piece.left_out.diagonal(dim1=1, dim2=2) if variances else piece.left_out
    return found + left_out / precisions.to(left_out).view(-1, *(1,) * left_out.ndim)
