"""Spectral-normalised neural Gaussian process (arXiv 2006.10108, JMLR 24:42), trained from scratch.

A comparison, written here because no library serves it as it is meant (looked at in November 2026):
`torch.nn.utils.parametrizations.spectral_norm` fixes the norm of a matrix, where the method bounds that of the operator,
which for a convolution is neither; `lightning_uq_box` 0.4 has the bound, but needs torchvision, and sums the precision
while the weights still move.

The precision of the output weights is the paper's, class by class: the prior's plus the curvature of the softmax
likelihood, its covariances between classes left out. It is computed once, over all training data, after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .budget import anneal, minibatches
from .fashion import network

PRIOR_PRECISIONS = torch.logspace(-3, 3, 25).tolist()
"""Those from which held-out data choose."""


class BoundedNorm(nn.Module):
    """A parametrisation: divides a weight such that the norm of its layer as an operator is at most a bound.

    The largest singular vector is followed by one step of power iteration whenever the weight is asked for in training
    mode, with the layer itself and its transpose on inputs of the actual size.

    Args:
        layer: linear or a convolution.
        example: one input of the layer, ``(1, ...)``; tells the size.
        bound: of the largest singular value.
        generator: draws the vector that power iteration starts from.
    """

    right: Tensor
    """The singular vector, of the shape of an input."""

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, example: Tensor, bound: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self._apply_layer: Callable[[Tensor, Tensor], Tensor] = F.linear
        if isinstance(layer, nn.Conv2d):
            options = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
            self._apply_layer = partial(F.conv2d, **options)
        self._bound = bound
        start = torch.randn(example.shape, generator=generator, dtype=example.dtype)
        self.register_buffer("right", start / start.norm())

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self._step(weight.detach())
        return weight * (self._bound / self._norm(weight)).clamp(max=1)

    @torch.no_grad()
    def converge(self, weight: Tensor, most_steps: int = 10_000) -> None:
        """Power iteration until the norm grows by less than rounding."""
        tolerance = torch.finfo(weight.dtype).eps
        norm = self._norm(weight)
        for _ in range(most_steps):
            self._step(weight)
            before, norm = norm, self._norm(weight)
            if norm <= before * (1 + tolerance):
                return

    def _norm(self, weight: Tensor) -> Tensor:
        """Of the image of the singular vector; its gradient is that of the singular value."""
        return self._apply_layer(self.right, weight).norm()

    def _step(self, weight: Tensor) -> None:
        image, transpose = torch.func.vjp(lambda v: self._apply_layer(v, weight), self.right)
        (right,) = transpose(image)
        self.right = right / right.norm()


def bound_norms(trunk: nn.Sequential, example: Tensor, bound: float, generator: torch.Generator) -> None:
    """Parametrises all linear layers and convolutions of `trunk` by `BoundedNorm`.

    Args:
        trunk: without other layers that have weights.
        example: one input, ``(1, ...)``.
        bound: of every layer's largest singular value.
        generator: draws vectors to start from.
    """
    for layer in trunk:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrisation = BoundedNorm(layer, example, bound, generator)
            parametrize.register_parametrization(layer, "weight", parametrisation)
        with torch.no_grad():
            example = layer(example)


def settle_norms(trunk: nn.Sequential) -> None:
    """Replaces the parametrisations by the weights that they stand for, after power iteration has converged."""
    for layer in trunk.eval():
        if parametrize.is_parametrized(layer):
            weights = layer.parametrizations.weight
            weights[0].converge(weights.original)
            parametrize.remove_parametrizations(layer, "weight")


class FourierFeatures(nn.Module):
    """``sqrt(2 / D) cos(W h + b)``, whose inner products approximate ``exp(-‖h - h'‖² / 2)`` (Rahimi and Recht, 2007).

    Args:
        n_inputs: size of ``h``.
        n_features: ``D``.
        generator: draws ``W``, standard normal, and ``b``, uniform on ``[0, 2π)``; neither is trained.
        dtype: of both.
    """

    weight: Tensor
    phase: Tensor

    def __init__(
        self, n_inputs: int, n_features: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        weight = torch.randn(n_features, n_inputs, generator=generator, dtype=dtype)
        phase = 2 * math.pi * torch.rand(n_features, generator=generator, dtype=dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("phase", phase)

    def forward(self, h: Float[Tensor, "N H"]) -> Float[Tensor, "N D"]:
        return math.sqrt(2 / len(self.phase)) * F.linear(h, self.weight, self.phase).cos()


@dataclass(frozen=True)
class OutputGaussian:
    """A Gaussian over the output weights of a network whose last hidden features are Fourier features.

    Attributes:
        features: from inputs to ``(N, D)``; in evaluation mode, trained.
        weights: mean of the output weights, ``(C, D)``.
        curvature: of the negative log-likelihood of the training data in the weights of every class, float64.
        eigenvalues: of `curvature`.
        eigenvectors: of `curvature`, in the columns.
        prior_precision: of every output weight.
    """

    features: nn.Module
    weights: Float[Tensor, "C D"]
    curvature: Float[Tensor, "C D D"]
    eigenvalues: Float[Tensor, "C D"]
    eigenvectors: Float[Tensor, "C D D"]
    prior_precision: float

    @property
    def precision(self) -> Float[Tensor, "C D D"]:
        """Of the output weights of every class."""
        return self.curvature + self.prior_precision * torch.eye(self.curvature.shape[-1]).to(self.curvature)

    def __call__(
        self, x: Float[Tensor, "N ..."], batch_size: int = 1000
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """Mean and covariance of the logits; the covariance is diagonal."""
        mean, squares = self.projected(x, batch_size)
        return mean, self._variance(squares, self.prior_precision).diag_embed()

