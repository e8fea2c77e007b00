"""Which approximation of a likelihood's expected link is meant, and draws of Gaussian outputs for the exact one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._random import standard_normal
from curvlin.numerics.symmetric_root import symmetric_root
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods import Likelihood

DEFAULT_LINK = "probit"
"""The default of `link_approx`."""


def check_link(likelihood: Likelihood, link_approx: str) -> str:
    """The approximation of the likelihood's expected link that is asked for; the default is its first closed form.

    One without a link takes the default only: there is nothing to approximate.

    Raises:
        UnsupportedError: if it does not have it.
    """
    closed_forms = [*likelihood.link_approximations, *likelihood.covariance_links]
    if link_approx == DEFAULT_LINK and (closed_forms or not likelihood.has_link):
        return (closed_forms or [DEFAULT_LINK])[0]
    offered = [*closed_forms, "mc"] if likelihood.has_link else [DEFAULT_LINK]
    if link_approx not in offered:
        raise UnsupportedError(
            f"link_approx={link_approx!r} is not supported for {likelihood.name}; expected {one_of(offered)}"
        )
    return link_approx


def draw(
    mean: Float[Tensor, "N C"],
    covariance: Float[Tensor, "N C C"],
    n_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "S N C"]:
    """Draws of N(mean, covariance), independent over N, through the symmetric root; the covariances may be singular."""
    covariance = covariance.double()
    eigenvalues, vectors = torch.linalg.eigh(covariance.detach())
    root = symmetric_root(covariance, vectors, eigenvalues.clamp(min=0)).to(mean.dtype)
    noise = standard_normal((n_samples,), mean.shape, generator, mean)
    return mean + (root @ noise.unsqueeze(-1)).squeeze(-1)
