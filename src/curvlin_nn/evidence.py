"""The Laplace approximation of the log marginal likelihood.

    log Z = log p(D | theta) / T - (theta - mu)^T P0 (theta - mu) / 2 - (logdet P - logdet P0) / 2
    P = H / (sigma^2 T) + P0

Where no block of H is cut by a change of the prior precision, its eigenvalues are all that is needed:
``logdet P - logdet P0 = sum_i log(1 + lambda_i / (sigma^2 T delta_i))``, with neither a factorisation nor a
difference of large numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.prior import GroupedPrior, Prior
from curvlin_nn.spectrum import Spectrum


def curvature_scale(sigma_noise: Float[Tensor, ""], temperature: float) -> Float[Tensor, ""]:
    """``1 / (sigma^2 T)``, float64."""
    return 1 / (sigma_noise.double().square() * temperature)


@dataclass(frozen=True)
class Evidence:
    """What the log marginal likelihood is a function of, besides the hyperparameters.

    Attributes:
        likelihood: the likelihood.
        statistics: its sufficient statistics over the data.
        curvature: H, at sigma = 1 and T = 1.
        spectrum: its eigenvalues, where there is a rule for them.
        temperature: T.
    """

    likelihood: Likelihood
    statistics: Float[Tensor, " K"]
    curvature: PrecisionOperator
    spectrum: Spectrum | None
    temperature: float

    def log_marginal_likelihood(self, prior: Prior, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """log Z in nats, float64, differentiable in the prior precision and the noise.

        Raises:
            NotPositiveDefiniteError: if the prior is lost in the rounding of H; predictions then raise as well.
        """
        spectrum, scale = self.relevant_spectrum(prior), self.scale(sigma_noise)
        if spectrum is not None and isinstance(prior, GroupedPrior):
            eigenvalues = scale * spectrum.eigenvalues + prior.precision[prior.groups]
            if bool((lost := eigenvalues <= scale * spectrum.floor).any()):
                raise NotPositiveDefiniteError("the posterior precision", float(eigenvalues[lost].min()))
        return self.value(prior, sigma_noise)

    def value(self, prior: Prior, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """`log_marginal_likelihood`, also where the eigenvalues alone resolve the prior: on a search's way."""
        scatter, complexity = prior.scatter(), self.log_det_ratio(prior, sigma_noise)
        return self.log_likelihood(sigma_noise) - scatter / 2 - complexity / 2

    def log_likelihood(self, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """``log p(D | theta) / T``, normaliser included."""
        return self.likelihood.log_likelihood(self.statistics, sigma_noise) / self.temperature

    def scale(self, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """``1 / (sigma^2 T)``, what H is multiplied by."""
        return curvature_scale(sigma_noise, self.temperature)

    def relevant_spectrum(self, prior: Prior) -> Spectrum | None:
        """The eigenvalues of H if they are all that is needed: no block is cut by a change of prior precision."""
        if self.spectrum is None or not isinstance(prior, GroupedPrior):
            return None
        return self.spectrum if self.spectrum.resolves(prior.groups) else None

    def log_det_ratio(self, prior: Prior, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """``logdet P - logdet P0``."""
        spectrum, scale = self.relevant_spectrum(prior), self.scale(sigma_noise)
        if spectrum is not None and isinstance(prior, GroupedPrior):
            return torch.log1p(scale * spectrum.eigenvalues / prior.precision[prior.groups]).sum()
        H = self.curvature.to(torch.float64)
        return (scale * H + prior.operator(H)).logdet() - prior.logdet()
