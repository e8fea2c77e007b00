"""What is asked of a prediction, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from curvlin._check import positive_integer
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.predictive.links import DEFAULT_LINK, check_link

PRED_TYPES = ("glm", "nn", "gp")
"""The distributions over outputs: of the linearised network, of the network at draws of its weights, and the first
again, by its name in function space."""


@dataclass(frozen=True)
class Request:
    """The arguments of `PosteriorPredictive.__call__` but for the inputs."""

    pred_type: str = "glm"
    link_approx: str = DEFAULT_LINK
    joint: bool = False
    diagonal_output: bool = False
    n_samples: int = 100
    generator: torch.Generator | None = None
    observation_noise: bool = False

    def checked(self, likelihood: Likelihood) -> Request:
        """The same with the name of the link's approximation resolved.

        Raises:
            UnsupportedError: for a combination that is not served.
            TypeError, ValueError: if `n_samples` is no positive integer where draws are needed.
        """
        check_noise(likelihood, self.observation_noise)
        if self.joint and self.diagonal_output:
            raise UnsupportedError("joint and diagonal_output exclude each other; choose one")
        link_approx = "mc" if self.pred_type == "nn" else check_link(likelihood, self.link_approx)
        if self.pred_type == "nn":
            check_sampled_link(likelihood, self.link_approx)
        if self.joint and not (likelihood.is_linear and not likelihood.has_link):
            raise UnsupportedError(
                f"joint is not supported for {likelihood.name}; use functional_samples for joint draws of outputs"
            )
        if link_approx == "mc":
            check_draws(self.n_samples, 1 if likelihood.has_link else 2)
        return replace(self, link_approx=link_approx)


def check_pred_type(pred_type: str, hessian_structure_is_gp: bool) -> None:
    """Whether predictions of this kind can be made.

    Raises:
        UnsupportedError: if they cannot.
    """
    if pred_type not in PRED_TYPES:
        raise UnsupportedError(f"pred_type={pred_type!r} is not supported; expected {one_of(PRED_TYPES)}")
    if pred_type == "gp" and not hessian_structure_is_gp:
        raise UnsupportedError(
            "pred_type='gp' needs hessian_structure='gp'; of other structures 'glm' is the same linearised predictive"
        )


def check_draws(n_samples: object, least: int) -> None:
    """Whether there are enough draws.

    Raises:
        TypeError, ValueError: if there are not.
    """
    if positive_integer("n_samples", n_samples) < least:
        raise ValueError(f"n_samples must be at least {least} for a covariance, found {n_samples}")


def check_noise(likelihood: Likelihood, observation_noise: bool) -> None:
    """Whether there is noise to add.

    Raises:
        UnsupportedError: if it is asked for and there is none.
    """
    if observation_noise and not likelihood.has_additive_noise:
        raise UnsupportedError(f"observation_noise needs a likelihood with noise, found {likelihood.name}")


def check_sampled_link(likelihood: Likelihood, link_approx: str) -> None:
    """Whether a link is left to the draws of the weights.

    Raises:
        UnsupportedError: if a closed form is named, which is one for Gaussian outputs.
    """
    if link_approx not in (DEFAULT_LINK, "mc"):
        raise UnsupportedError(
            f"link_approx={link_approx!r} is not supported with pred_type='nn', whose outputs are draws; expected 'mc'"
        )
