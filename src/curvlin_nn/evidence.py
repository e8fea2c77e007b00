"""The Laplace approximation of the log marginal likelihood, and the hyperparameters that maximise it.

    log Z = log p(D | theta) / T - (theta - mu)^T P0 (theta - mu) / 2 - (logdet P - logdet P0) / 2
    P = H / (sigma^2 T) + P0

With t = log prior precisions and tau = log sigma^2, ``logdet P`` is the logarithm of a sum of exponentials of
linear functions (the determinant expanded, H being PSD), so log Z is concave in (t, tau): it has one maximum,
and Newton's method finds it from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Dense, NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import ConvergenceError, NoFiniteOptimumError, UnsupportedError
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.prior import GroupedPrior, Prior
from curvlin_nn.spectrum import Spectrum

MAX_STEP = 4.0
"""The longest step in any logarithm: where curvature vanishes, Newton's own step has no bound."""


@dataclass(frozen=True)
class Evidence:
    """What the log marginal likelihood is a function of, besides the hyperparameters.

    Attributes:
        likelihood: the likelihood.
        statistics: its sufficient statistics over the data.
        curvature: H, at sigma = 1 and T = 1.
        spectrum: its eigenvalues, where there is a rule for them.
        temperature: T.
    """

    likelihood: Likelihood
    statistics: Float[Tensor, " K"]
    curvature: PrecisionOperator
    spectrum: Spectrum | None
    temperature: float

    def log_marginal_likelihood(self, prior: Prior, sigma_noise: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """log Z in nats, float64, differentiable in the prior precision and the noise."""
        log_likelihood = self.likelihood.log_likelihood(self.statistics, sigma_noise) / self.temperature
        scale = 1 / (sigma_noise.double().square() * self.temperature)
        return log_likelihood - prior.scatter() / 2 - (self._logdet(prior, scale) - prior.logdet()) / 2

    def resolves(self, prior: GroupedPrior) -> bool:
        """Whether the eigenvalues of H alone give ``logdet P``: no group boundary cuts through a block."""
        return self.spectrum is not None and self.spectrum.resolves(prior.groups)

    def _logdet(self, prior: Prior, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
        if self.spectrum is not None and isinstance(prior, GroupedPrior) and self.resolves(prior):
            return torch.log(scale * self.spectrum.eigenvalues + prior.precision[prior.groups]).sum()
        H = self.curvature.to(torch.float64)
        return (scale * H + prior.operator(H)).logdet()


@dataclass(frozen=True)
class Optimum:
    """Where the log marginal likelihood is largest.

    Attributes:
        prior_precision: one entry per group.
        sigma_noise: the noise scale, optimised or as it was.
        log_marginal_likelihood: the value there, in nats.
        gradient_norm: of log Z with respect to the logarithms of the precisions and of sigma^2.
        steps: the number of Newton steps.
    """

    prior_precision: Float[Tensor, " K"]
    sigma_noise: float
    log_marginal_likelihood: float
    gradient_norm: float
    steps: int


@dataclass(frozen=True)
class _Point:
    """Value, gradient and negative Hessian of log Z at ``(t, tau)``; tau's parts are None for fixed noise."""

    value: Tensor
    gradient: Tensor
    scale_of_gradient: Tensor
    bend: Tensor  # (K,) where the groups do not interact, (K, K) where they do
    bend_noise: Tensor | None
    coupling: Tensor | None
    gradient_noise: Tensor | None
    scale_of_noise: Tensor | None

    def converged(self, tolerance: float) -> bool:
        small = bool((self.gradient.abs() <= tolerance * self.scale_of_gradient).all())
        if self.gradient_noise is None or self.scale_of_noise is None:
            return small
        return small and bool(self.gradient_noise.abs() <= tolerance * self.scale_of_noise)

    def gradient_norm(self) -> float:
        parts = (
            [self.gradient]
            if self.gradient_noise is None
            else [self.gradient, self.gradient_noise.reshape(1)]
        )
        return float(torch.cat(parts).norm())

    def step(self) -> tuple[Tensor, Tensor]:
        """Newton's step in t and tau, by the Schur complement of tau."""
        g = self._solve(self.gradient)
        if self.bend_noise is None or self.coupling is None or self.gradient_noise is None:
            return g, self.value.new_zeros(())
        w = self._solve(self.coupling)
        noise = (self.gradient_noise - self.coupling @ g) / (self.bend_noise - self.coupling @ w)
        return g - w * noise, noise

    def _solve(self, b: Tensor) -> Tensor:
        return b / self.bend if self.bend.ndim == 1 else torch.linalg.solve(self.bend, b)


def maximise(
    evidence: Evidence,
    prior: GroupedPrior,
    sigma_noise: float,
    *,
    optimize_noise: bool = False,
    tolerance: float = 1e-9,
    max_steps: int = 200,
) -> Optimum:
    """Newton's method on the logarithms of the prior precisions (and of the noise variance).

    Args:
        evidence: the function to maximise.
        prior: its precision is where to start; the groups say which coordinates share one.
        sigma_noise: the noise scale, or where to start with it.
        optimize_noise: whether the noise scale is a variable.
        tolerance: largest gradient allowed, relative to the larger of the two terms it is a difference of.
        max_steps: Newton steps before giving up.

    Raises:
        NoFiniteOptimumError: if log Z increases without end towards zero or infinity in some hyperparameter.
        ConvergenceError: if `max_steps` do not suffice.
    """
    _check_served(evidence, prior)
    _check_optimum_exists(evidence, prior, optimize_noise)
    if not evidence.resolves(prior):
        # The shared optimum is cheap to find from the eigenvalues; from there no matrix is badly conditioned.
        shared = replace(prior, precision=prior.precision[:1], groups=torch.zeros_like(prior.groups))
        coarse = maximise(evidence, shared, sigma_noise, optimize_noise=optimize_noise, max_steps=max_steps)
        prior = replace(prior, precision=coarse.prior_precision.expand(len(prior.precision)))
        sigma_noise = coarse.sigma_noise
    t = prior.precision.detach().double().log()
    tau = torch.tensor(sigma_noise, dtype=torch.float64, device=t.device).square().log()
    point = _evaluate(evidence, prior, t, tau, optimize_noise)
    for steps in range(max_steps):
        if point.converged(tolerance):
            noise = float((tau / 2).exp()) if optimize_noise else sigma_noise
            return Optimum(t.exp(), noise, float(point.value), point.gradient_norm(), steps)
        t, tau, point = _ascend(evidence, prior, t, tau, point, optimize_noise)
    raise ConvergenceError(
        f"the prior precision did not converge in {max_steps} steps (gradient norm "
        f"{point.gradient_norm():.1e}); raise max_steps, or check that the model was trained"
    )


def _ascend(
    evidence: Evidence, prior: GroupedPrior, t: Tensor, tau: Tensor, point: _Point, with_noise: bool
) -> tuple[Tensor, Tensor, _Point]:
    """One Newton step, shortened until it does not lead down."""
    step, step_noise = point.step()
    fraction = min(1.0, MAX_STEP / float(torch.maximum(step.abs().max(), step_noise.abs())))
    # Near the optimum the value is flat to rounding, and rounding must not stop the last steps.
    lowest = point.value - 1e-14 * (point.value.abs() + len(prior.groups))
    for halvings in range(30):
        trial = t + fraction * step / 2**halvings, tau + fraction * step_noise / 2**halvings
        try:
            found = _evaluate(evidence, prior, *trial, with_noise)
        except NotPositiveDefiniteError:
            continue  # too close to a singular matrix to be the maximum
        if bool(found.value >= lowest):
            return *trial, found
    raise ConvergenceError(
        "no step increases the log marginal likelihood although its gradient norm is "
        f"{point.gradient_norm():.1e}; loosen tolerance"
    )


def _evaluate(evidence: Evidence, prior: GroupedPrior, t: Tensor, tau: Tensor, with_noise: bool) -> _Point:
    """log Z and its first two derivatives.

    ``m_k = delta_k tr((P^-1)_kk)`` is the part of logdet P's degree of homogeneity that belongs to group k;
    the rest, ``gamma_k = D_k - m_k``, is the effective number of parameters (MacKay, 1992). ``d log Z / dt_k
    = (gamma_k - delta_k |theta - mu|_k^2) / 2``.
    """
    here = replace(prior, precision=t.exp())
    m, bend = _traces(evidence, here, (-tau).exp() / evidence.temperature)
    gamma, scatter = prior.sizes - m, here.squares * here.precision
    value = evidence.log_marginal_likelihood(here, (tau / 2).exp())
    bend_scatter = scatter / 2 if bend.ndim == 1 else torch.diag(scatter) / 2
    row_sums = bend if bend.ndim == 1 else bend.sum(1)
    if not with_noise:
        none = (None, None, None, None)
        return _Point(value, (gamma - scatter) / 2, (gamma + scatter) / 2, bend / 2 + bend_scatter, *none)
    slope, curve = _noise_derivatives(evidence, tau)
    return _Point(
        value,
        (gamma - scatter) / 2,
        (gamma + scatter) / 2,
        bend / 2 + bend_scatter,
        bend_noise=row_sums.sum() / 2 - curve,
        coupling=row_sums / 2,
        gradient_noise=slope + gamma.sum() / 2,
        scale_of_noise=curve.abs() + gamma.sum() / 2,
    )


def _traces(evidence: Evidence, prior: GroupedPrior, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``m`` and the Hessian of logdet P in t: ``delta_kl m_k - delta_k delta_l |(P^-1)_kl|_F^2``."""
    spectrum, groups = evidence.spectrum, prior.groups
    zeros = torch.zeros_like(prior.precision)
    if spectrum is not None and evidence.resolves(prior):
        delta = prior.precision[groups]
        free = delta / (scale * spectrum.eigenvalues + delta)
        return zeros.index_add(0, groups, free), zeros.index_add(0, groups, free * (1 - free))
    H = evidence.curvature.to(torch.float64)
    P = scale * H + prior.operator(H)
    covariance = P.solve(torch.eye(P.size, dtype=torch.float64, device=P.device))
    m = prior.precision * zeros.index_add(0, groups, covariance.diagonal())
    between = covariance.square()
    between = zeros.new_zeros(len(zeros), P.size).index_add(0, groups, between)
    between = zeros.new_zeros(len(zeros), len(zeros)).index_add(1, groups, between)
    return m, torch.diag(m) - torch.outer(prior.precision, prior.precision) * between


def _check_served(evidence: Evidence, prior: GroupedPrior) -> None:
    if not evidence.resolves(prior) and not isinstance(evidence.curvature, Dense):
        raise UnsupportedError(
            "this prior structure cuts through blocks of the curvature (a "
            f"{type(evidence.curvature).__name__}), expected one that does not; use prior_structure='scalar' "
            "or 'layerwise', or hessian_structure='full'"
        )


def _check_optimum_exists(evidence: Evidence, prior: GroupedPrior, optimize_noise: bool) -> None:
    squares = prior.squares
    if bool((squares == 0).any()):
        k = int((squares == 0).nonzero()[0])
        raise NoFiniteOptimumError(
            f"{prior.label(k)} equals the prior mean exactly, so that the log marginal likelihood grows "
            "without end in its prior precision; train the model, or fix prior_precision"
        )
    diagonal = evidence.curvature.diagonal().double()
    informed = torch.zeros_like(squares).index_add(0, prior.groups, diagonal)
    if bool((informed <= 0).any()):
        k = int((informed <= 0).nonzero()[0])
        raise NoFiniteOptimumError(
            f"the curvature of {prior.label(k)} is zero, so that the log marginal likelihood grows without "
            "end as its prior precision goes to zero; fix prior_precision, or leave it out with "
            "subset_of_weights"
        )
    if optimize_noise and bool(_noise_derivatives(evidence, squares.new_zeros(()))[1] >= 0):
        raise NoFiniteOptimumError(
            "the residuals are all zero, so that the log marginal likelihood grows without end as "
            "sigma_noise goes to zero; fix sigma_noise"
        )


def _noise_derivatives(evidence: Evidence, tau: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the (tempered) log-likelihood in tau."""
    with torch.enable_grad():
        variable = tau.detach().requires_grad_()
        fit = (
            evidence.likelihood.log_likelihood(evidence.statistics, (variable / 2).exp())
            / evidence.temperature
        )
        (slope,) = torch.autograd.grad(fit, variable, create_graph=True)
        (curve,) = torch.autograd.grad(slope, variable)
    return slope.detach(), curve
