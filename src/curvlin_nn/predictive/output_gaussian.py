"""`OutputGaussian`: a Gaussian over the outputs of a model, at any inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class OutputGaussian(ABC):
    """What predictions are made from where outputs are Gaussian."""

    @abstractmethod
    def mean_and_covariance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """Mean and covariance of the outputs of each sample."""

    @abstractmethod
    def mean_and_variance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """Mean and variance of each output."""

    @abstractmethod
    def joint(self, x: Any) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        """Mean and covariance of all outputs of all samples, sample-major."""

    @abstractmethod
    def samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "S N C"]:
        """Draws of the outputs as functions: jointly Gaussian over inputs."""
