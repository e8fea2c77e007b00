"""What trains the covariance of a fixed-mean Gaussian process: two bounds of the evidence that share it.

    -(1/N) sum_m [ sum_n log E_q p(y_n | m(x_n) + g(x_n)) - KL ],  m the network, and m the companion

with g of the posterior around zero, and the term ``a^T k_Z a / 2`` in the KL of the companion. Only the second bound says
what a prior of the data is like: the kernel must leave room for a mean that fits them (Ortega et al., 2024, section 3).
Priors that are registered on the kernel's parameters count once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.batches import batches
from curvlin_nn.errors import DataError
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.predictive import Response
from curvlin_nn.variational.fixed_mean_gp import Core, FixedMeanGP
from curvlin_nn.variational.objective import ExpectedProbability
from curvlin_nn.variational.points import Points


@dataclass(frozen=True)
class FixedMeanObjective:
    """See the module.

    Attributes:
        points: what the kernel sees of a sample.
        gp: what is trained.
        likelihood: of targets.
        output_shape: of the outputs of one sample.
        n_data: the number of training samples, N.
    """

    points: Points
    gp: FixedMeanGP
    likelihood: Likelihood
    output_shape: tuple[int, ...]
    n_data: int

    @property
    def _expected(self) -> ExpectedProbability:
        return ExpectedProbability(
            Response(self.likelihood, lambda: self.output_shape, self.gp.sigma_noise)
        )

    def loss(self, x: Any, targets: Tensor, where: str) -> Float[Tensor, ""]:
        """Minus the two bounds, those of the network's and of the companion's mean, for each sample of the data."""
        seen = self.points(x, where)
        targets = self.likelihood.check(seen.outputs, targets, where)
        core, expected = self.gp.core(), self._expected
        cross = core.cross(seen.points)
        spread = self._spread(core, seen.points, cross)
        a = self.gp.companion
        fits = [expected(mean, spread, targets) for mean in (seen.rows.double(), cross @ a)]
        penalty = 2 * core.divergence() + a @ core.K_Z @ a / 2 - self.gp.log_prior()
        return penalty / self.n_data - sum(fits) / len(targets)

    @torch.no_grad()
    def score(self, loader: Iterable[Any], device: torch.device) -> float:
        """The mean negative log-likelihood around the network's mean."""
        core, expected = self.gp.core(), self._expected
        total, n_data = 0.0, 0
        for index, (x, targets) in enumerate(batches(loader, device)):
            where = f"batch {index} of validation_loader"
            seen = self.points(x, where)
            checked = self.likelihood.check(seen.outputs, targets, where)
            spread = self._spread(core, seen.points, core.cross(seen.points))
            total -= float(expected(seen.rows.double(), spread, checked))
            n_data += len(targets)
        if n_data == 0:
            raise DataError("validation_loader yielded no batch, expected at least one (inputs, targets)")
        return total / n_data

    def _spread(self, core: Core, points: Tensor, cross: Tensor) -> Tensor:
        return core.covariance(points, cross) if self._expected.needs_covariance else core.variance(points, cross)
