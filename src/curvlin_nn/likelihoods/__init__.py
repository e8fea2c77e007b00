"""Likelihoods: log-probabilities, curvature columns and links, one family per file."""

from curvlin_nn.likelihoods.base import Likelihood
from curvlin_nn.likelihoods.bernoulli import Bernoulli
from curvlin_nn.likelihoods.categorical import Categorical
from curvlin_nn.likelihoods.custom import Custom
from curvlin_nn.likelihoods.gaussian import Gaussian
from curvlin_nn.likelihoods.heteroscedastic import HeteroscedasticGaussian
from curvlin_nn.likelihoods.losses import from_loss
from curvlin_nn.likelihoods.poisson import Poisson
from curvlin_nn.likelihoods.preference import Preference
from curvlin_nn.likelihoods.registry import available, register
from curvlin_nn.likelihoods.resolution import resolve

__all__ = [
    "Bernoulli",
    "Categorical",
    "Custom",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Poisson",
    "Preference",
    "available",
    "from_loss",
    "register",
    "resolve",
]
