"""The Gaussian likelihood with one noise scale: regression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import DataError
from curvlin_nn.likelihoods.base import Likelihood, LinkApproximation
from curvlin_nn.likelihoods.registry import register


@register
class Gaussian(Likelihood):
    """``y ~ N(f, sigma^2 I)``; ``Lambda = I`` at sigma = 1, Hessian and Fisher information alike."""

    name = "regression"
    has_noise = True
    link_approximations: ClassVar[Mapping[str, LinkApproximation]] = {}

    def check(self, outputs: Float[Tensor, "N C"], targets: Tensor, where: str) -> Float[Tensor, "N C"]:
        """See `Likelihood.check`."""
        if not targets.is_floating_point():
            raise DataError(f"targets of {where} must be floating numbers, found dtype {targets.dtype}")
        if targets.shape != outputs.shape:
            raise DataError(
                f"targets of {where} must have the shape {tuple(outputs.shape)} of the outputs, found "
                f"{tuple(targets.shape)}; nothing is broadcast"
            )
        if not bool(torch.isfinite(targets).all()):
            raise DataError(f"targets of {where} must be finite, found NaN or Inf")
        return targets

    def columns(self, outputs: Float[Tensor, "N C"]) -> Float[Tensor, "V N C"]:
        """The identity."""
        n_samples, n_outputs = outputs.shape
        identity = torch.eye(n_outputs, dtype=outputs.dtype, device=outputs.device)
        return identity[:, None, :].expand(n_outputs, n_samples, n_outputs)

    def statistics(self, outputs: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, " K"]:
        """The number of samples, then the sum of squared residuals of each output."""
        squares = (targets.double() - outputs.double()).square().sum(0)
        return torch.cat([squares.new_full((1,), len(outputs)), squares])

    def log_likelihood(
        self, statistics: Float[Tensor, " K"], sigma_noise: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """``- sum r^2 / (2 sigma^2) - N C log(2 pi sigma^2) / 2``."""
        count, squares = statistics[0] * (len(statistics) - 1), statistics[1:].sum()
        variance = sigma_noise.double().square()
        return -(squares / variance + count * torch.log(2 * math.pi * variance)) / 2

    def link(self, outputs: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """The outputs themselves."""
        return outputs
