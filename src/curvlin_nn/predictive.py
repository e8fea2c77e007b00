"""From the Gaussian over outputs, ``f(x) ~ N(f_MAP(x), Phi_x P^-1 Phi_x^T)``, to predictions.

Nothing here forms a Jacobian: covariances are congruences of the posterior precision with factored features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvlin import FeatureOperator
from curvlin.numerics.repeats import repeats
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.feature_maps.alignment import aligned
from curvlin_nn.likelihoods import Likelihood

FEATURE_BUDGET = 2**23
"""Entries of the tensors of features held at once: 32 MiB in float32."""

DEFAULT_LINK = "probit"
"""The default of `link_approx`."""

DRAW_BUDGET = 2**26
"""Entries of the tensor of posterior draws held at once."""


@dataclass(frozen=True)
class Predictive:
    """The linearised posterior over outputs.

    Attributes:
        feature_map: the linearisation.
        precision: the posterior precision of its coordinates, factored.
        progress_bar: whether to show one over the parts of the data.
    """

    feature_map: FeatureMap
    precision: PrecisionOperator
    progress_bar: bool = False

    def mean_and_covariance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """Mean and covariance of the outputs of each sample."""
        parts = [(f, self.precision.inv_congruence(Phi)) for f, Phi in self._chunks(x)]
        return torch.cat([f for f, _ in parts]), torch.cat([covariance for _, covariance in parts])

    def mean_and_variance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """Mean and variance of each output."""
        parts = [(f, self.precision.inv_congruence_diagonal(Phi)) for f, Phi in self._chunks(x)]
        return torch.cat([f for f, _ in parts]), torch.cat([variance for _, variance in parts])

    def joint(self, x: Any) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        """Mean and covariance of all outputs of all samples, sample-major."""
        f, Phi = self._features(x)
        covariance = self.precision.inv_congruence(Phi, joint=True)
        return f.flatten(), covariance.reshape(f.numel(), f.numel())

    def samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "S N C"]:
        """Draws of the linearised model as a function, evaluated at x: jointly Gaussian over inputs.

        Each draw is one weight vector, pushed through the features; draws from one generator state are draws
        of the same functions, whatever x is.
        """
        per_part = max(1, min(n_samples, DRAW_BUDGET // self.precision.size))
        parts = []
        for start in range(0, n_samples, per_part):
            draws = self.precision.sample((min(per_part, n_samples - start),), generator=generator)
            rows = [f + (Phi @ draws.mT).movedim(-1, 0) for f, Phi in self._chunks(x)]
            parts.append(torch.cat(rows, dim=1))
        return torch.cat(parts)

    def _chunks(self, x: Any) -> Iterator[tuple[Tensor, FeatureOperator]]:
        """Outputs and features of x, a bounded number of samples at a time; two samples measure the size."""
        if not isinstance(x, Tensor) or x.shape[:1].numel() <= 1:
            yield self._features(x)
            return
        probe = self._features(x[:2])
        # What all samples have in common, as the identity of a last layer, is held once.
        per_sample = sum(t.numel() // 2 for t, own in probe[1]._tensors() if not repeats(t, -own))
        chunk = max(1, FEATURE_BUDGET // max(1, per_sample))
        for start in tqdm(range(0, len(x), chunk), desc="prediction", disable=not self.progress_bar):
            yield self._features(x[start : start + chunk])

    def _features(self, x: Any) -> tuple[Tensor, FeatureOperator]:
        """Outputs, and features cut into the blocks of the precision."""
        f, Phi = self.feature_map(x)
        return f, aligned(Phi, self.precision)


def draw(
    mean: Float[Tensor, "N C"],
    covariance: Float[Tensor, "N C C"],
    n_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "S N C"]:
    """Draws of N(mean, covariance), independent over N; the covariances may be singular."""
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)).to(mean.dtype)
    noise = torch.randn((n_samples, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (root @ noise.unsqueeze(-1)).squeeze(-1)


def check_link(likelihood: Likelihood, link_approx: str) -> str:
    """The approximation of the likelihood's expected link that is asked for; the default is its first closed form.

    One without a link takes the default only: there is nothing to approximate.

    Raises:
        UnsupportedError: if it does not have it.
    """
    closed_forms = list(likelihood.link_approximations)
    if link_approx == DEFAULT_LINK and (closed_forms or not likelihood.has_link):
        return (closed_forms or [DEFAULT_LINK])[0]
    offered = [*closed_forms, "mc"] if likelihood.has_link else [DEFAULT_LINK]
    if link_approx not in offered:
        raise UnsupportedError(
            f"link_approx={link_approx!r} is not supported for {likelihood.name}; expected {one_of(offered)}"
        )
    return link_approx
