"""The Poisson likelihood with logarithmic link: counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import Likelihood, LinkApproximation
from curvlin_nn.likelihoods.registry import register


def log_normal_mean(
    mean: Float[Tensor, "*batch E"], variance: Float[Tensor, "*batch E"]
) -> Float[Tensor, "*batch E"]:
    """``E exp(f) = exp(mean + variance / 2)``, exactly."""
    return torch.exp(mean + variance / 2)


@register
class Poisson(Likelihood):
    """Every output is the logarithm of the rate of a count: ``Lambda = exp(f)``, Hessian and Fisher information."""

    name = "poisson"
    has_counts = True
    link_approximations: Mapping[str, LinkApproximation] = {"exact": log_normal_mean}
    event_ndim = 0

    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Float[Tensor, "N R"]:
        """See `Likelihood.check`."""
        if targets.is_complex():
            raise DataError(f"targets of {where} must be counts, found dtype {targets.dtype}")
        _check.target_shape(targets, outputs.shape, where)
        y = targets.double().reshape(len(targets), -1)
        counts = torch.isfinite(y) & (y >= 0) & (y == y.round())
        if not bool(counts.all()):
            raise DataError(f"targets of {where} must be counts 0, 1, 2, ..., found {float(y[~counts][0])}")
        if not bool(torch.isfinite(outputs.exp()).all()):
            raise OutputError(
                f"outputs on {where} must be logarithms of rates in the range of {outputs.dtype}, found "
                f"{float(outputs.max()):.4g}"
            )
        return y

    def root(self, terms: Float[Tensor, "N R 1"], targets: Tensor) -> Float[Tensor, "N R 1 1"]:
        """``exp(f / 2)``."""
        return (terms / 2).exp()[..., None]

    def draw(
        self, terms: Float[Tensor, "N R 1"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Float[Tensor, "K N R"]:
        """See `Likelihood.draw`."""
        rate = terms.double().squeeze(-1).exp()
        return torch.poisson(rate.expand(n_draws, *rate.shape), generator=generator)

    def score(
        self, terms: Float[Tensor, "N R 1"], targets: Float[Tensor, "*K N R"]
    ) -> Float[Tensor, "*K N R 1"]:
        """``exp(f) - y``."""
        return terms.exp() - targets[..., None].to(terms)

    def log_prob(self, terms: Float[Tensor, "N R 1"], targets: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
        """``y f - exp(f) - log y!``."""
        f, y = terms.squeeze(-1), targets.to(terms)
        return y * f - f.exp() - torch.lgamma(y + 1)

    def largest_count(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """``k = 2 rate + 60``: ``P(y > k) < exp(k - rate - k log(k / rate)) < 1e-32`` at this rate or a lower one.

        The bound is Chernoff's; beyond k probabilities at least halve from count to count.
        """
        return torch.ceil(2 * terms.squeeze(-1).exp() + 60)

    def target_variance(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The rate."""
        return terms.exp()

    def link(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The rate."""
        return terms.exp()

    def inverse_link(self, prediction: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Logarithms of rates."""
        return prediction.log()
