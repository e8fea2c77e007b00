"""Likelihoods: log-probabilities, curvature columns and links, one family per file."""

from curvlin_nn.likelihoods.base import Likelihood
from curvlin_nn.likelihoods.categorical import Categorical
from curvlin_nn.likelihoods.gaussian import Gaussian
from curvlin_nn.likelihoods.registry import available, register, resolve

__all__ = ["Categorical", "Gaussian", "Likelihood", "available", "register", "resolve"]
