"""What a row of the table predicts for some images: logits that are certain, Gaussian, or drawn."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin_nn.predictive.links import draw

N_DRAWS = 2048
"""Of Gaussian logits, to average the softmax over."""

SEED = 2147483647
"""Of these draws, in every row."""

CHUNK = 250
"""Images whose logits are drawn at once."""

Draw = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""Draws of Gaussians, from their means, their covariances, and how many."""


class Logits(ABC):
    """Of N images, in whatever form a method has them."""

    @abstractmethod
    def log_probabilities(self) -> Tensor:
        """The logarithm of the mean softmax, ``(N, C)``."""

    def log_probabilities_as_published(self) -> Tensor:
        """The same as the published script draws it."""
        return self.log_probabilities()

    def log_determinants(self) -> Tensor | None:
        """Of the covariances, ``(N,)``: twice the entropies of the Gaussians over logits, up to a constant."""
        return None


@dataclass(frozen=True)
class CertainLogits(Logits):
    """Those of a network alone, ``(N, C)``."""

    values: Tensor

    def log_probabilities(self) -> Tensor:
        return self.values.log_softmax(-1)


@dataclass(frozen=True)
class GaussianLogits(Logits):
    """Mean ``(N, C)`` and covariance ``(N, C, C)``."""

    mean: Tensor
    covariance: Tensor

    def log_probabilities(self) -> Tensor:
        return self._log_mean_softmax_of(draw)

    def log_probabilities_as_published(self) -> Tensor:
        """See `Logits.log_probabilities_as_published`."""
        return self._log_mean_softmax_of(_draw_as_published)

    def _log_mean_softmax_of(self, draw: Draw) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        parts = zip(self.mean.split(CHUNK), self.covariance.split(CHUNK), strict=True)
        return torch.cat([_log_mean_softmax(draw(m, V, N_DRAWS, generator)) for m, V in parts])

    def log_determinants(self) -> Tensor:
        """See `Logits.log_determinants`; eigenvalues below the rounding of the largest count as that rounding."""
        eigenvalues = torch.linalg.eigvalsh(self.covariance.double())
        rounding = torch.finfo(self.covariance.dtype).eps * eigenvalues[:, -1:]
        return eigenvalues.clamp(min=rounding.clamp(min=torch.finfo(torch.float64).tiny)).log().sum(-1)


@dataclass(frozen=True)
class DrawnLogits(Logits):
    """Draws ``(S, N, C)``."""

    draws: Tensor

    def log_probabilities(self) -> Tensor:
        return _log_mean_softmax(self.draws)


def _draw_as_published(
    mean: Tensor, covariance: Tensor, n_samples: int, generator: torch.Generator
) -> Tensor:
    """Draws ``f + z L``, whose covariance is ``L^T L`` where it should be ``L L^T``.

    A covariance that float32 has left without a Cholesky factor gets as much on its diagonal as that rounds it by.
    """
    V = covariance.double()
    rounding = torch.finfo(covariance.dtype).eps * V.diagonal(dim1=-2, dim2=-1).amax(-1)
    L = torch.linalg.cholesky(V + rounding[:, None, None] * torch.eye(V.shape[-1])).to(mean.dtype)
    noise = torch.randn(n_samples, *mean.shape, dtype=mean.dtype, generator=generator)
    return mean + torch.einsum("sna,nab->snb", noise, L)


def _log_mean_softmax(draws: Tensor) -> Tensor:
    """By logarithms, so that no probability underflows."""
    return draws.log_softmax(-1).logsumexp(0) - math.log(len(draws))


Predict = Callable[[Tensor], Logits]
"""What a row makes: images ``(N, 1, 28, 28)`` to logits."""


def in_batches(predict: Predict, x: Tensor, size: int = 500) -> list[Logits]:
    """What is predicted for all of x, some at a time."""
    return [predict(part) for part in x.split(size)]
