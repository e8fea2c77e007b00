"""What trains the covariance of a fixed-mean Gaussian process: two objectives that share it.

    -(1/N) sum_m [ sum_n log E p(y_n | m(x_n) + g(x_n)) - KL_m ],  m the network, and m the companion

with g of the posterior around zero. KL is the part that the covariance decides; that of the companion has the norm of
its mean, ``a^T k_Z a / 2``, as well. The first objective alone says nothing of the prior: the kernel would fall with
the posterior. The second needs a kernel of which a mean can be made that fits the data (Ortega et al., 2024, section
3). Priors that are registered on the kernel's parameters count once.
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
from curvlin_nn.variational import kernels
from curvlin_nn.variational.expected_likelihood import couples_outputs, log_expected_likelihood
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP, SparseCovariance
from curvlin_nn.variational.points import Points


@dataclass(frozen=True)
class FixedMeanObjective:
    """The objective of a batch, and the score of held-out data.

    Attributes:
        points: what the kernel sees of a sample.
        gp: what is trained.
        likelihood: of targets.
        n_data: N, the number of training samples.
    """

    points: Points
    gp: FixedMeanGP
    likelihood: Likelihood
    n_data: int

    def loss(self, x: Any, targets: Tensor, where: str) -> Float[Tensor, ""]:
        """For each sample of the data, in nats: an unbiased estimate from a batch.

        Raises:
            DataError: if inputs or targets do not fit.
            OutputError: if outputs do not, or are not finite.
        """
        seen = self.points(x, where)
        targets = self.likelihood.check(seen.outputs, targets, where)
        posterior = self.gp.covariance()
        cross = posterior.cross(seen.points)
        spread = self._spread(posterior, seen.points, cross)
        f, m = seen.outputs.double(), (cross @ self.gp.companion).reshape(seen.outputs.shape)
        fit = sum(self._expected(mean, spread, targets).mean() for mean in (f, m))
        norm = self.gp.companion @ posterior.dual.kernel @ self.gp.companion
        penalty = 2 * posterior.dual.divergence() + norm / 2 - kernels.log_prior(self.gp.kernel)
        return penalty / self.n_data - fit

    @torch.no_grad()
    def score(self, loader: Iterable[Any], device: torch.device) -> float:
        """The mean negative log-likelihood of held-out data around the network's mean.

        Raises:
            DataError: if the loader yields nothing, or inputs or targets that do not fit.
            OutputError: if outputs do not, or are not finite.
        """
        posterior = self.gp.covariance()
        found = []
        for index, (x, targets) in enumerate(batches(loader, device)):
            where = f"batch {index} of validation_loader"
            seen = self.points(x, where)
            targets = self.likelihood.check(seen.outputs, targets, where)
            spread = self._spread(posterior, seen.points, posterior.cross(seen.points))
            found.append(self._expected(seen.outputs.double(), spread, targets))
        if not found:
            raise DataError("validation_loader yielded no batch, expected at least one (inputs, targets)")
        return -float(torch.cat(found).mean())

    def _spread(self, posterior: SparseCovariance, points: Tensor, cross: Tensor) -> Tensor:
        of = posterior.by_sample if couples_outputs(self.likelihood) else posterior.variance
        return of(points, cross)

    def _expected(self, mean: Tensor, spread: Tensor, targets: Tensor) -> Float[Tensor, " N"]:
        return log_expected_likelihood(self.likelihood, mean, spread, targets, self.gp.sigma_noise)
