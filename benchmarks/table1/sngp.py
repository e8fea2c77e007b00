"""Spectral-normalised neural Gaussian process (arXiv 2006.10108, JMLR 24:42), trained from scratch.

A comparison, written here because no library serves it as it is meant (November 2026). `lightning_uq_box` 0.4 needs
torchvision, and sums the precision while the weights still move. `torch.nn.utils.parametrizations.spectral_norm` sets
the norm of the weight as a matrix, where the method bounds that of the layer as an operator.

The precision of the output weights is that of the authors' code, shared by the classes: ``s I + Σ_n φ_n φ_nᵀ``, with
one for every ``p (1 - p)`` of the softmax. With the latter, class by class, variance is least next to the boundaries
between classes and largest where the network is sure, whether or not there are data. The sum is taken once, over all
training data, after training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .fashion import network
from .training import anneal, channels_last, minibatches

PRIOR_PRECISIONS = torch.logspace(-3, 3, 25).tolist()
"""Those from which held-out data choose."""


class BoundedNorm(nn.Module):
    """A parametrisation: scales a weight down where the norm of its layer as an operator is above a bound.

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
        """Power iteration in float64 until the norm grows by less than rounding."""
        dtype, weight = weight.dtype, weight.double()
        self.right = self.right.double()
        norm = self._norm(weight)
        for _ in range(most_steps):
            self._step(weight)
            before, norm = norm, self._norm(weight)
            if norm <= before * (1 + torch.finfo(torch.float64).eps):
                break
        self.right = self.right.to(dtype)

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
    """A Gaussian over the output weights of a network, of equal precision for every class and independent between them.

    Nothing in it changes with use.

    Attributes:
        features: from inputs to ``(N, D)``, trained.
        weights: mean of the output weights.
        precision: of the output weights of each class, float64.
        directions: its eigenvectors, in the columns.
        variances: the reciprocals of its eigenvalues.
    """

    features: nn.Module
    weights: Float[Tensor, "C D"]
    precision: Float[Tensor, "D D"]
    directions: Float[Tensor, "D D"]
    variances: Float[Tensor, " D"]

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "N ..."], batch_size: int = 250
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """Mean and covariance of the logits; the covariance is a multiple of the identity."""
        means, variances = [], []
        for part in x.split(batch_size):
            phi = self.features(channels_last(part))
            means.append(phi @ self.weights.mT)
            variances.append(_variances(phi, self.directions, self.variances))
        identity = torch.eye(len(self.weights)).to(x)
        return torch.cat(means), torch.cat(variances)[:, None, None] * identity


def fit(
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    *,
    seed: int,
    seconds: float = math.inf,
    x_val: Float[Tensor, "M ..."] | None = None,
    y_val: Int[Tensor, " M"] | None = None,
    trunk: nn.Sequential | None = None,
    n_classes: int = 10,
    n_features: int = 1024,
    bound: float = 6.0,
    prior_precision: float = 1.0,
    n_epochs: int = 20,
    batch_size: int = 64,
    lr: float = 1e-3,
) -> OutputGaussian:
    """Trains trunk and output weights by maximum a posteriori, then takes the curvature in the output weights.

    Fourier features and bound as published by the method's authors; the optimiser is that of the network beside it.

    Args:
        x: training inputs.
        y: their classes.
        seed: of all that is random.
        seconds: CPU time after which to stop training.
        x_val: inputs held out, perhaps none. With them, the precision that predicts takes the prior precision of the
            smallest negative log-likelihood among `PRIOR_PRECISIONS`.
        y_val: their classes.
        trunk: up to the last hidden features, untrained; a copy is trained. None is that of the table.
        n_classes: number of logits.
        n_features: number of Fourier features.
        bound: of the norm of every hidden layer.
        prior_precision: of the output weights in training; of the precision, too, without held-out inputs.
        n_epochs: after which to stop training.
        batch_size: examples per step.
        lr: learning rate of Adam at first; it falls to zero along a cosine.

    Returns:
        Answers inputs with the mean ``(N, C)`` and the covariance ``(N, C, C)`` of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = network()[:-1] if trunk is None else copy.deepcopy(trunk)
        bound_norms(trunk.train(), x[:1], bound, generator)
        n_hidden = trunk(x[:1]).shape[-1]
        fourier = FourierFeatures(n_hidden, n_features, generator, x.dtype)
        output = nn.Linear(n_features, n_classes, bias=False, dtype=x.dtype)
    features = nn.Sequential(trunk, fourier)

    optimizer = torch.optim.Adam([*features.parameters(), *output.parameters()], lr)
    n_steps = n_epochs * math.ceil(len(x) / batch_size)
    for spent, batch in minibatches(len(x), batch_size, n_steps, seconds, generator):
        anneal(optimizer, spent)
        optimizer.zero_grad()
        penalty = prior_precision / (2 * len(x)) * output.weight.square().sum()
        (F.cross_entropy(output(features(channels_last(x[batch]))), y[batch]) + penalty).backward()
        optimizer.step()
    settle_norms(trunk)
    features.requires_grad_(False)

    weights = output.weight.detach()
    curvature = gram(features, x)
    eigenvalues, directions = torch.linalg.eigh(curvature)
    eigenvalues, directions = eigenvalues.clamp(min=0), directions.to(x)
    if x_val is not None and y_val is not None and len(x_val):
        log_p = partial(_log_likelihoods, features, weights, directions, eigenvalues, generator=generator)
        scores = torch.stack([log_p(*part) for part in zip(x_val.split(250), y_val.split(250), strict=True)])
        prior_precision = PRIOR_PRECISIONS[int(scores.sum(0).argmax())]
    variances = 1 / (eigenvalues + prior_precision)
    precision = curvature + prior_precision * torch.eye(n_features, dtype=curvature.dtype)
    return OutputGaussian(features, weights, precision, directions, variances.to(x))


@torch.no_grad()
def gram(features: nn.Module, x: Float[Tensor, "N ..."], batch_size: int = 250) -> Float[Tensor, "D D"]:
    """``Σ_n φ_n φ_nᵀ``, in one pass and in float64."""
    parts = (features(channels_last(part)).double() for part in x.split(batch_size))
    return sum(phi.mT @ phi for phi in parts)


@torch.no_grad()
def _log_likelihoods(
    features: nn.Module,
    weights: Float[Tensor, "C D"],
    directions: Float[Tensor, "D D"],
    eigenvalues: Float[Tensor, " D"],
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    generator: torch.Generator,
    n_samples: int = 100,
) -> Float[Tensor, " S"]:
    """Of the classes under every one of `PRIOR_PRECISIONS`, by draws of the logits that are the same for all."""
    candidates = torch.tensor(PRIOR_PRECISIONS, dtype=eigenvalues.dtype)[:, None]
    phi = features(channels_last(x))
    mean = phi @ weights.mT
    std = _variances(phi, directions, (eigenvalues + candidates).reciprocal().to(phi)).sqrt()
    noise = torch.randn(n_samples, 1, *mean.shape, generator=generator, dtype=phi.dtype)
    log_p = (mean + noise * std.unsqueeze(-1)).log_softmax(-1).logsumexp(0) - math.log(n_samples)
    return log_p[:, torch.arange(len(y)), y].sum(-1)


def _variances(
    phi: Float[Tensor, "N D"], directions: Float[Tensor, "D D"], variances: Float[Tensor, "*S D"]
) -> Float[Tensor, "*S N"]:
    """Of a logit, from those of its output weights along their directions."""
    return variances @ (phi @ directions).square().mT
