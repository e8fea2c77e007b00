"""``log E_q p(y | f)`` for Gaussian outputs: the terms of the objective that trains a covariance.

    regression  log N(y; m, V + sigma^2 Sigma), exact, with the covariances between the outputs of a sample
    classes     log p(y | m / sqrt(1 + pi/8 v)), the probit approximation, for softmax and logistic links

It is the energy of black-box alpha divergences at ``alpha = 1`` (Hernandez-Lobato et al., 2016), and what gpytorch calls a
predictive log-likelihood. A covariance appears in it as it does in predictions, which ``E_q log p`` does not offer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from curvlin_nn.likelihoods.base import weighted
from curvlin_nn.predictive import Response


def check_served(likelihood: Likelihood) -> None:
    """Whether there is a closed form.

    Raises:
        UnsupportedError: if there is none.
    """
    if not isinstance(likelihood, (Bernoulli, Categorical, Gaussian)):
        raise UnsupportedError(
            f"likelihood {likelihood.name!r} is not supported, whose expected probabilities have no closed form here; "
            "expected 'regression', 'classification' or 'binary'"
        )


@dataclass(frozen=True)
class ExpectedProbability:
    """``sum log E_q p(y | f)`` over the samples of a batch, in float64.

    Attributes:
        response: the likelihood, the shape of outputs and the noise.
    """

    response: Response

    def with_noise(self, sigma_noise: Float[Tensor, "*C"]) -> ExpectedProbability:
        """The same at another noise scale."""
        return ExpectedProbability(replace(self.response, sigma_noise=sigma_noise))

    @property
    def needs_covariance(self) -> bool:
        """Whether covariances between outputs count, and not variances alone."""
        return isinstance(self.response.likelihood, Gaussian)

    def __call__(
        self,
        mean: Float[Tensor, "N C"],
        spread: Float[Tensor, "N C"] | Float[Tensor, "N C C"],
        targets: Tensor,
    ) -> Float[Tensor, ""]:
        """The sum.

        Args:
            mean: of the outputs.
            spread: their variances, or what `needs_covariance` asks for.
            targets: as `Likelihood.check` gives them.
        """
        likelihood = self.response.likelihood
        if self.needs_covariance:
            scatter = spread + self.response.noise_covariance(mean, None)
            found = torch.distributions.MultivariateNormal(mean, scatter, validate_args=False)
            return found.log_prob(targets.to(mean).reshape(mean.shape)).sum()
        shrunk = self.response.terms(mean / torch.sqrt(1 + math.pi / 8 * spread))
        return weighted(likelihood.log_prob(shrunk, targets), likelihood.weights(shrunk, targets)).sum()
