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

    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Float[Tensor, "N R E"]:
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
        return self.terms(targets)

    def root(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R E E"]:
        """The identity."""
        identity = torch.eye(terms.shape[-1], dtype=terms.dtype, device=terms.device)
        return identity.expand(*terms.shape, terms.shape[-1])

    def draw(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Float[Tensor, "K N R E"]:
        """See `Likelihood.draw`."""
        noise = torch.randn(
            n_draws, *terms.shape, dtype=terms.dtype, device=terms.device, generator=generator
        )
        return terms + noise

    def score(
        self, terms: Float[Tensor, "N R E"], targets: Float[Tensor, "*K N R E"]
    ) -> Float[Tensor, "*K N R E"]:
        """``f - y``."""
        return terms - targets

    def statistics(self, outputs: Float[Tensor, N * T], targets: Tensor) -> Float[Tensor, " K"]:
        """The number of terms, then the sum of squared residuals of each of a term's outputs."""
        terms = self.terms(outputs).double()
        squares = (targets.double() - terms).square().sum((0, 1))
        return torch.cat([squares.new_full((1,), terms[..., 0].numel()), squares])

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
