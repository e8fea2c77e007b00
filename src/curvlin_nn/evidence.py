"""The Laplace approximation of the log marginal likelihood.

    log Z = log p(D | theta) / T - (theta - mu)^T P0 (theta - mu) / 2 - (logdet P - logdet P0) / 2
    P = H / (sigma^2 T) + P0

Where no block of H is cut by a change of the prior precision, its eigenvalues are all that is needed:
``logdet P - logdet P0 = sum_i log(1 + lambda_i / (sigma^2 T delta_i))``, with neither a factorisation nor a
difference of large numbers.

On the coordinates of a feature map it may count what the features leave out, and is a bound then; see `evidence_bound`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.curvature import State
from curvlin_nn.damping import DampedCurvature
from curvlin_nn.errors import LostPriorError
from curvlin_nn.grouped_eigenvalues import GroupedEigenvalues
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.per_output import PerOutput, weighted_sum
from curvlin_nn.prior import GroupedPrior, Prior
from curvlin_nn.spectrum import Spectrum, spectrum


@dataclass(frozen=True)
class Curvature:
    """H as a function of the noise.

    Attributes:
        total: H, at sigma = 1 and T = 1.
        outputs: the curvature of each output, where each has a noise scale of its own; see `per_output`.
        damped: how its Kronecker products combine with a prior, if they are not added to it; see `damping`.
    """

    total: PrecisionOperator
    outputs: tuple[PrecisionOperator, ...] | None = None
    damped: DampedCurvature | None = None

    @classmethod
    def of(cls, state: State, *, damping: bool = False) -> Curvature:
        """Of what was summed over data.

        Raises:
            UnsupportedError: if it is to be damped and has no Kronecker products.
        """
        H = state.finish()
        damped = DampedCurvature.of(H) if damping else None
        return cls(H, state.outputs() if isinstance(state, PerOutput) else None, damped)

    @property
    def n_noise_scales(self) -> int:
        """How many outputs' curvature is kept apart; zero where one noise scale is of all."""
        return len(self.outputs or ())

    def posterior(
        self, prior: Prior, sigma_noise: Float[Tensor, "*C"], temperature: float | Tensor
    ) -> PrecisionOperator:
        """P, not factored, float64.

        Raises:
            NotClosedError: if H and the prior have no sum in closed form.
        """
        if self.damped is not None:
            return self.damped.precision(prior, curvature_scale(sigma_noise, temperature))
        H = self.scaled(sigma_noise, temperature)
        P0 = prior.operator(H)
        try:
            return H + P0
        except NotClosedError as error:
            raise NotClosedError(
                f"prior_precision, a {type(P0).__name__} here, does not add in closed form to the curvature, a "
                f"{type(H).__name__}, expected one number for each of its blocks; take prior_projection='kronecker' or "
                "'isotropic', or hessian_structure='full' or 'diag'"
            ) from error

    def scaled(self, sigma_noise: Float[Tensor, "*C"], temperature: float | Tensor) -> PrecisionOperator:
        """``H / (sigma^2 T)``, or ``sum_c H_c / (sigma_c^2 T)``, float64."""
        scale = curvature_scale(sigma_noise, temperature)
        if scale.ndim == 0:
            return scale * self.total.to(torch.float64)
        assert self.outputs is not None  # a vector is accepted with these only
        return weighted_sum(self.outputs, scale)

    @cached_property
    @outside_inference_mode()
    def spectrum(self) -> Spectrum | None:
        """The eigenvalues of H, computed when first asked for; None where there is no rule for them."""
        return spectrum(self.total) if self.damped is None else self.damped.spectrum()

    @cached_property
    @outside_inference_mode()
    def eigenvalues(self) -> GroupedEigenvalues | None:
        """All of them in one group."""
        if self.spectrum is None or self.damped is not None:
            return None
        return GroupedEigenvalues.of(self.spectrum, torch.zeros_like(self.spectrum.block), n_groups=1)


@contextmanager
def prior_not_lost() -> Iterator[None]:
    """Where a sum of H, which is positive semidefinite, and a prior is factored.

    Raises:
        LostPriorError: if it is not positive definite.
    """
    try:
        yield
    except NotPositiveDefiniteError as error:
        raise LostPriorError(f"the posterior precision ({error.where})", error.value) from error


def curvature_scale(sigma_noise: Float[Tensor, "*C"], temperature: float | Tensor) -> Float[Tensor, "*C"]:
    """``1 / (sigma^2 T)``, float64."""
    return 1 / (sigma_noise.double().square() * temperature)


@dataclass(frozen=True)
class Evidence:
    """What the log marginal likelihood is a function of, besides the hyperparameters.

    Attributes:
        likelihood: the likelihood.
        statistics: its sufficient statistics over the data.
        curvature: H, at sigma = 1 and T = 1, and as a function of them.
        temperature: T.
        left_out: the trace of the curvature beside the features, at sigma = 1 and T = 1 (of each output, where these
            have noise scales of their own); None where it does not count.
    """

    likelihood: Likelihood
    statistics: Float[Tensor, " K"]
    curvature: Curvature
    temperature: float | Float[Tensor, ""]
    left_out: Float[Tensor, "*C"] | None = None

    def log_marginal_likelihood(self, prior: Prior, sigma_noise: Float[Tensor, "*C"]) -> Float[Tensor, ""]:
        """log Z in nats, float64, differentiable in the prior precision and mean, the noise and the temperature.

        Raises:
            LostPriorError: if the prior is lost in the rounding of H, beside which its eigenvalues are found.
        """
        known = None if sigma_noise.ndim else self.relevant_spectrum(prior)
        if known is not None and isinstance(prior, GroupedPrior):
            scale = self.scale(sigma_noise)
            for some in known.floored:
                # Of dense blocks, the only ones with a floor, the first row has all that there is.
                first = known.eigenvalues.reshape(-1, len(known.block))[0, some]
                eigenvalues = scale * first + prior.precision[prior.groups[some]]
                if bool((lost := eigenvalues <= scale * known.floor[some]).any()):
                    raise LostPriorError("the posterior precision", float(eigenvalues[lost].min()))
        return self.value(prior, sigma_noise)

    def value(self, prior: Prior, sigma_noise: Float[Tensor, "*C"]) -> Float[Tensor, ""]:
        """`log_marginal_likelihood`, also where the eigenvalues alone resolve the prior: on a search's way."""
        scatter, complexity = prior.scatter(), self.log_det_ratio(prior, sigma_noise)
        if self.left_out is not None:
            assert isinstance(prior, GroupedPrior)  # that of features has one precision
            complexity = complexity + self.left_out_ratio(prior.precision, sigma_noise).sum()
        return self.log_likelihood(sigma_noise) - scatter / 2 - complexity / 2

    def log_likelihood(self, sigma_noise: Float[Tensor, "*C"]) -> Float[Tensor, ""]:
        """``log p(D | theta) / T``, normaliser included."""
        return self.likelihood.log_likelihood(self.statistics, sigma_noise) / self.temperature

    def scale(self, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """``1 / (sigma^2 T)``, what H is multiplied by."""
        return curvature_scale(sigma_noise, self.temperature)

    def left_out_ratio(
        self, precision: Float[Tensor, " 1"], sigma_noise: Float[Tensor, "*C"]
    ) -> Float[Tensor, " 1"]:
        """``left_out / (sigma^2 T delta)``, the most that directions beside the features add to `log_det_ratio`."""
        assert self.left_out is not None
        return (curvature_scale(sigma_noise, self.temperature) * self.left_out).sum() / precision

    def relevant_spectrum(self, prior: Prior) -> Spectrum | None:
        """The eigenvalues of H if they are all that is needed: no block is cut by a change of prior precision."""
        if not isinstance(prior, GroupedPrior) or self.curvature.spectrum is None:
            return None
        shared = len(prior.precision) == 1 or self.curvature.spectrum.resolves(prior.groups)
        return self.curvature.spectrum if shared else None

    def log_det_ratio(self, prior: Prior, sigma_noise: Float[Tensor, "*C"]) -> Float[Tensor, ""]:
        """``logdet P - logdet P0``."""
        if sigma_noise.ndim == 0 and isinstance(prior, GroupedPrior):
            known, scale = self.relevant_spectrum(prior), self.scale(sigma_noise)
            if known is not None:
                return torch.log1p(known.ratios(scale, prior.by_coordinate)).sum()
        P = self.curvature.posterior(prior, sigma_noise, self.temperature)
        with prior_not_lost():
            logdet = P.logdet()
        return logdet - prior.logdet()
