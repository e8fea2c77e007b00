"""``log E p(y | f)`` for Gaussian outputs f: what a variational posterior with ``alpha = 1`` is fitted by.

    Gaussian noise    log N(y; m, V + sigma^2 Sigma), exactly, of all outputs of a sample together
    classes, bits     log p(y | m / sqrt(1 + pi/8 v)), each logit shrunk by its own variance (MacKay, 1992)

By Jensen's inequality the first is at least the expected log-likelihood: what is maximised is no bound of the evidence,
but the objective of power expectation propagation with ``alpha = 1`` (Li & Gal, 2017, Dropout inference in Bayesian
neural networks with alpha-divergences). It looks at the variance of a prediction as a whole, noise included.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from curvlin_nn.likelihoods.base import weighted
from curvlin_nn.predictive.response import Response


def check_expected(likelihood: Likelihood) -> Likelihood:
    """Whether the expected likelihood of a family is known.

    Raises:
        UnsupportedError: if it is not.
    """
    if not isinstance(likelihood, (Categorical, Bernoulli, Gaussian)):
        raise UnsupportedError(
            f"likelihood {likelihood.name} has no closed form of its expectation that a variational posterior could be "
            "fitted by; expected one of 'classification', 'binary', 'regression'"
        )
    return likelihood


def couples_outputs(likelihood: Likelihood) -> bool:
    """Whether `log_expected_likelihood` needs the covariances of a sample's outputs, and not their variances alone."""
    return isinstance(likelihood, Gaussian)


def log_expected_likelihood(
    likelihood: Likelihood,
    outputs: Float[Tensor, N * T],
    spread: Float[Tensor, "N C"] | Float[Tensor, "N C C"],
    targets: Tensor,
    sigma_noise: Float[Tensor, "*E"],
) -> Float[Tensor, " N"]:
    """Of each sample, in nats, its weight included; differentiable in the spread and the noise.

    Soft targets count as ``sum_c t_c log E p_c``.

    Args:
        likelihood: one that `check_expected` lets pass.
        outputs: the mean, in the model's shape.
        spread: variances of the flattened outputs, or covariances where `couples_outputs`.
        targets: as `Likelihood.check` gave them.
        sigma_noise: the noise scale, of all outputs or of each of a term.
    """
    if couples_outputs(likelihood):
        mean = outputs.reshape(len(outputs), -1)
        noise = Response(likelihood, lambda: tuple(outputs.shape[1:]) or (1,), sigma_noise)
        covariance = spread + noise.noise_covariance(mean, None)
        residual = targets.to(mean).reshape(mean.shape) - mean
        lower = torch.linalg.cholesky_ex(covariance).L
        white = torch.linalg.solve_triangular(lower, residual.unsqueeze(-1), upper=False).squeeze(-1)
        logdet = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -(white.square().sum(-1) + logdet + mean.shape[1] * math.log(2 * math.pi)) / 2
    variances = likelihood.terms(spread.reshape(outputs.shape))
    shrunk = likelihood.terms(outputs) / torch.sqrt(1 + math.pi / 8 * variances)
    return weighted(likelihood.log_prob(shrunk, targets), likelihood.weights(shrunk, targets)).sum(-1)
