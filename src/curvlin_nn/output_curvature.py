"""The curvature of the log-likelihood in the terms themselves: what a last layer needs, without columns."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from curvlin_nn.likelihoods.base import Likelihood, weighted


@dataclass(frozen=True)
class OutputCurvature:
    """``w Lambda`` of every term of a batch.

    Attributes:
        likelihood: the family.
        terms: the model's outputs, term by term.
        targets: as `Likelihood.check` returned them.
        weights: of the terms; None where all are one.
    """

    likelihood: Likelihood
    terms: Float[Tensor, "N R E"]
    targets: Tensor
    weights: Float[Tensor, "N R"] | None

    def total(self) -> Float[Tensor, "E E"]:
        """``sum_nr w Lambda``, float64."""
        weights = None if self.weights is None else self.weights.double()
        return self.likelihood.total_curvature(self.terms.double(), self.targets, weights)

    def diagonal(self) -> Float[Tensor, "N R E"]:
        """The diagonal of each, float64."""
        diagonal = self.likelihood.curvature_diagonal(self.terms.double(), self.targets)
        return weighted(diagonal, None if self.weights is None else self.weights.double()[..., None])
