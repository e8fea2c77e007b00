"""What trains the covariance of a fixed-mean Gaussian process: two objectives that share it.

    - sum_m [ sum_n log E p(y_n | m(x_n) + g(x_n)) - KL_m ],  m the network, and m the companion

with g of the posterior around zero. KL is the part that the covariance decides; that of the companion has the norm of
its mean, ``a^T k_Z a / 2``, as well. The first objective alone says nothing of the prior: the kernel would fall with
the posterior. The second needs a kernel of which a mean can be made that fits the data (Ortega et al., 2024, section
3). Priors that are registered on the kernel's parameters count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.variational import kernels
from curvlin_nn.variational.expected_likelihood import couples_outputs, log_expected_likelihood
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP
from curvlin_nn.variational.points import Points


@dataclass(frozen=True)
class FixedMeanObjective:
    """What is minimised, by batches.

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
        """For all data, in nats: an unbiased estimate from a batch.

        Raises:
            DataError: if inputs or targets do not fit.
            OutputError: if outputs do not, or are not finite.
        """
        seen = self.points(x, where)
        targets = self.likelihood.check(seen.outputs, targets, where)
        posterior = self.gp.covariance()
        cross = posterior.cross(seen.points)
        spread_of = posterior.by_sample if couples_outputs(self.likelihood) else posterior.variance
        spread, sigma = spread_of(seen.points, cross), self.gp.sigma_noise
        a = self.gp.companion
        fit = sum(
            log_expected_likelihood(self.likelihood, mean, spread, targets, sigma).mean()
            for mean in (seen.outputs.double(), (cross @ a).reshape(seen.outputs.shape))
        )
        penalty = 2 * posterior.dual.divergence() + a @ posterior.dual.kernel @ a / 2
        return penalty - kernels.log_prior(self.gp.kernel) - self.n_data * fit
