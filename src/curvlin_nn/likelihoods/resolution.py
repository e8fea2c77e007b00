"""What users call a likelihood: a name, a torch loss, or a likelihood."""

from __future__ import annotations

from torch import nn

from curvlin_nn.likelihoods.base import Likelihood
from curvlin_nn.likelihoods.losses import from_loss
from curvlin_nn.likelihoods.registry import named


def resolve(likelihood: str | nn.Module | Likelihood) -> Likelihood:
    """A likelihood from its name or from a loss module, or itself.

    Raises:
        UnsupportedError: if no family has that name, or a loss has no likelihood.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    return from_loss(likelihood) if isinstance(likelihood, nn.Module) else named(likelihood)
