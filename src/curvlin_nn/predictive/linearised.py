"""The linearised network: ``f(x) ~ N(f_MAP(x), Phi_x P^-1 Phi_x^T)``.

Nothing here forms a Jacobian: covariances are congruences of the posterior precision with factored features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import DenseFeatures, FeatureOperator
from curvlin._check import floating
from curvlin.numerics.repeats import repeats
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.feature_maps.alignment import aligned
from curvlin_nn.input_parts import in_parts
from curvlin_nn.predictive.draws import deviations
from curvlin_nn.predictive.output_gaussian import OutputGaussian

FEATURE_BUDGET = 2**22
"""Entries of the tensors of features held at once: 16 MiB in float32."""


@dataclass(frozen=True)
class Predictive(OutputGaussian):
    """The linearised posterior over outputs.

    Attributes:
        feature_map: the linearisation.
        precision: the posterior precision of its coordinates, factored.
        progress_bar: whether to show one over the parts of the data.
    """

    feature_map: FeatureMap
    precision: PrecisionOperator
    progress_bar: bool = False

    def mean_and_covariance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """Mean and covariance of the outputs of each sample."""
        parts = [(f, self.precision.inv_congruence(Phi)) for f, Phi in self._chunks(x)]
        return torch.cat([f for f, _ in parts]), torch.cat([covariance for _, covariance in parts])

    def mean_and_variance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """Mean and variance of each output."""
        parts = [(f, self.precision.inv_congruence_diagonal(Phi)) for f, Phi in self._chunks(x)]
        return torch.cat([f for f, _ in parts]), torch.cat([variance for _, variance in parts])

    def joint(self, x: Any) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        """Mean and covariance of all outputs of all samples, sample-major."""
        f, Phi = self._features(x)
        covariance = self.precision.inv_congruence(Phi, joint=True)
        return f.flatten(), covariance.reshape(f.numel(), f.numel())

    def samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "S N C"]:
        """Draws of the linearised model as a function, evaluated at x: jointly Gaussian over inputs.

        Each draw is one weight vector, pushed through the features; draws from one generator state are draws
        of the same functions, whatever x is.
        """
        parts = []
        for draws in deviations(self.precision, n_samples, generator):
            rows = [f + (Phi @ draws.mT).movedim(-1, 0) for f, Phi in self._chunks(x)]
            parts.append(torch.cat(rows, dim=1))
        return torch.cat(parts)

    def _chunks(self, x: Any) -> Iterator[tuple[Tensor, FeatureOperator]]:
        """Outputs and features of x, a bounded number of samples at a time."""
        return in_parts(
            x,
            self._features,
            n_samples=self.feature_map.n_samples,
            entries=lambda found: _own_entries(found[1]),
            budget=FEATURE_BUDGET,
            progress_bar=self.progress_bar,
        )

    def _features(self, x: Any) -> tuple[Tensor, FeatureOperator]:
        """Outputs, and features cut into the blocks of the precision."""
        f, Phi = self.feature_map(x)
        return f, aligned(Phi, self.precision)


def _own_entries(Phi: FeatureOperator) -> int:
    """What all samples have in common, as the identity of a last layer, is held once."""
    return sum(t.numel() for t, own in Phi._tensors() if not repeats(t, -own))


def functional_covariance(
    precision: PrecisionOperator, Js: FeatureOperator | Float[Tensor, "N C P"], *, joint: bool
) -> Float[Tensor, "N C C"] | Float[Tensor, "NC NC"]:
    """``J P^-1 J^T`` for given Jacobians, of each sample or of all together, sample-major.

    Args:
        precision: P.
        Js: as features, or multiplied out.
        joint: whether samples are coupled.

    Raises:
        TypeError, ValueError: if they do not fit the precision.
    """
    if isinstance(Js, FeatureOperator):
        Phi = aligned(Js, precision)
    else:
        Phi = DenseFeatures(floating("Js", Js, ndim=3, like=precision.diagonal()))
    covariance = precision.inv_congruence(Phi, joint=joint)
    return covariance.flatten(2, 3).flatten(0, 1) if joint else covariance
