"""Hyperparameters of a posterior as they are given: numbers and vectors, checked."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn._check import numbers
from curvlin_nn.columns import Columns
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods import Likelihood


def checked_mean(value: float | Tensor) -> Float[Tensor, "*P"]:
    """A prior mean.

    Raises:
        ValueError: if it is no finite number or flat vector.
    """
    mean = numbers("prior_mean", value)
    if not mean.is_floating_point() or mean.ndim > 1 or not bool(torch.isfinite(mean).all()):
        raise ValueError(
            f"prior_mean must be a number or a flat vector, finite, found shape {tuple(mean.shape)} of "
            f"{mean.dtype}"
        )
    return mean


def checked_temperature(value: float | Tensor) -> Float[Tensor, ""]:
    """A temperature.

    Raises:
        ValueError: if it is not one number, positive and finite.
    """
    temperature = numbers("temperature", value)
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, found shape {tuple(temperature.shape)}")
    if not 0 < (found := float(temperature.detach())) < float("inf"):
        raise ValueError(f"temperature must be positive and finite, found {found}")
    return temperature.reshape(())


def checked_noise(value: float | Tensor, likelihood: Likelihood, columns: Columns) -> Float[Tensor, "*C"]:
    """A noise scale, or one for each output where the likelihood has such.

    Raises:
        UnsupportedError: if there are more than are served.
        ValueError: if one is not positive and finite, or the likelihood has no noise.
    """
    noise = numbers("sigma_noise", value)
    if noise.numel() == 1:
        noise = noise.reshape(())
    elif noise.ndim != 1 or not likelihood.has_noise_by_output:
        expected = "one number or one for each output" if likelihood.has_noise_by_output else "one number"
        raise UnsupportedError(
            f"sigma_noise must be {expected} for {likelihood.name}, found shape {tuple(noise.shape)}"
        )
    refused = noise[~((noise > 0) & torch.isfinite(noise))].flatten()
    if refused.numel():
        raise ValueError(f"sigma_noise must be positive and finite, found {float(refused.detach()[0])}")
    if not likelihood.has_noise and float(noise.detach()) != 1:
        raise ValueError(
            f"sigma_noise must be 1 for {likelihood.name}, which has no noise, found {float(noise.detach())}"
        )
    if bool((noise != 1).any()):
        check_knows_noise(columns)
    return noise


def check_knows_noise(columns: Columns) -> None:
    """An empirical Fisher matrix is of gradients, which change with the noise in another way than Hessians do.

    Raises:
        UnsupportedError: for its columns.
    """
    if columns.kind == "empirical":
        raise UnsupportedError(
            "sigma_noise must be 1 for curvature='ef', which is of gradients at sigma = 1; take curvature='ggn', "
            "or divide targets and outputs by it"
        )
