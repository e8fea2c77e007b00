"""The Gaussian over outputs whose mean is the network's and whose covariance is a sparse Gaussian process's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvlin_nn.predictive.output_gaussian import OutputGaussian
from curvlin_nn.variational.fixed_mean_gp import SparseCovariance
from curvlin_nn.variational.points import Seen

BUDGET = 2**22
"""Entries of the covariances with inducing variables that are held at once: 32 MiB."""


@dataclass(frozen=True)
class FixedMean(OutputGaussian):
    """Mean and covariance; the first as the model returns it, for all samples at once.

    Attributes:
        network: gives outputs and points.
        covariance: the covariance, without gradients.
        progress_bar: whether to show one over parts of the samples.
    """

    network: Callable[[Any], Seen]
    covariance: SparseCovariance
    progress_bar: bool = False

    def mean_and_covariance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
        """See `OutputGaussian.mean_and_covariance`."""
        return self._with_spread(x, self.covariance.by_sample)

    def mean_and_variance(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """See `OutputGaussian.mean_and_variance`."""
        return self._with_spread(x, self.covariance.variance)

    @torch.no_grad()
    def joint(self, x: Any) -> tuple[Float[Tensor, " NC"], Float[Tensor, "NC NC"]]:
        """See `OutputGaussian.joint`."""
        f, points = self._at(x)
        return f.flatten(), self.covariance.joint(points).to(f.dtype)

    @torch.no_grad()
    def samples(
        self, x: Any, n_samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "S N C"]:
        """Draws, jointly Gaussian over the inputs of this call; another call draws other functions.

        A universal kernel has no finite number of coordinates that draws could be kept by.
        """
        f, points = self._at(x)
        parts = self.covariance.samples(points, n_samples, generator)
        return f + torch.cat([part.to(f.dtype) for part in parts])

    @torch.no_grad()
    def _with_spread(self, x: Any, of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        f, points = self._at(x)
        parts = [of(some, self.covariance.cross(some)) for some in self._parts(points, f.shape[1])]
        return f, torch.cat(parts).to(f.dtype)

    def _at(self, x: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N D"]]:
        seen = self.network(x)
        return seen.rows, seen.points

    def _parts(self, points: Float[Tensor, "N D"], n_outputs: int) -> Iterator[Tensor]:
        at_once = max(1, BUDGET // (n_outputs * max(n_outputs, len(self.covariance.points))))
        yield from tqdm(points.split(at_once), "prediction", disable=not self.progress_bar)
