"""The prior precision (and noise) that maximise the log marginal likelihood, by Newton's method.

With t = log prior precisions and tau = log sigma^2, ``logdet P`` is the logarithm of a sum of exponentials of
linear functions (its determinant expanded, H being PSD), so log Z is concave in (t, tau): it has one maximum,
which Newton's method with bounded steps finds from anywhere. Its derivatives are those of

    gamma_k = D_k - delta_k tr((P^-1)_kk)                     effective number of parameters (MacKay, 1992)
    d log Z / dt_k = (gamma_k - delta_k |theta_k - mu_k|^2) / 2
    B_kl = d gamma_k / dt_l with its sign changed = delta_kl m_k - delta_k delta_l |(P^-1)_kl|_F^2

for groups k of coordinates, ``m_k = D_k - gamma_k``. As P is homogeneous in ``(delta, 1 / sigma^2)``, those in
tau are sums over the groups.

What features leave out (see `evidence_bound`) adds to ``logdet P`` the one term ``r = left_out / (sigma^2 T delta)``,
an exponential of a linear function itself, and adds r to gamma and to B.

All of this holds for a Kronecker-damped posterior as well (see `damping`), but for the expressions in ``P^-1``: its
determinant has half the powers, and gamma and B are sums over the eigenvalues of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvlin import Dense, NotPositiveDefiniteError
from curvlin_nn.errors import ConvergenceError, NoFiniteOptimumError, UnsupportedError
from curvlin_nn.evidence import Evidence
from curvlin_nn.grouped_eigenvalues import DampedEigenvalues, GroupedEigenvalues
from curvlin_nn.prior import GroupedPrior
from curvlin_nn.spectrum import Spectrum

MAX_STEP = 4.0
"""The longest step in any logarithm: where curvature vanishes, Newton's own step has no bound."""

SURE_STEP = 0.5
"""Newton's step, or a part of it, that is no longer than this in any logarithm increases log Z.

Along a line ``t + e s`` with ``r = max |s_k|`` every term of log Z has ``|f'''| <= 2 r |f''|``, so the curvature grows
by ``exp(2 r e)`` at most and a fraction a of Newton's step gains ``a (1 - a (exp(x) - 1 - x) / x^2)`` times the
slope, ``x = 2 r a``: more than a quarter of ``a`` at ``x = 1``. A longer step does where log Z still grows along it at
its end. No value needs to be compared, whose terms cancel and whose last digits would stop the last steps.
"""

ROUNDING = 32 * torch.finfo(torch.float64).eps
"""A gradient that is a difference of numbers of parameters is lost where it is less than so much for each of them."""


@dataclass(frozen=True)
class Optimum:
    """Where the log marginal likelihood is largest.

    Attributes:
        prior_precision: one entry per group.
        sigma_noise: the noise scale, or that of each output, optimised or as it was.
        log_marginal_likelihood: the value there, in nats; of its bound, if that is what was maximised.
        gradient_norm: of log Z with respect to the logarithms of the precisions and of sigma^2.
        steps: the number of Newton steps.
    """

    prior_precision: Float[Tensor, " K"]
    sigma_noise: float | Float[Tensor, " C"]
    log_marginal_likelihood: float
    gradient_norm: float
    steps: int


@dataclass(frozen=True)
class _Noise:
    """The part of a point that belongs to tau: derivatives of log Z, and the second ones across to t."""

    gradient: Tensor
    size: Tensor  # of the terms whose difference the gradient is
    bend: Tensor
    coupling: Tensor


@dataclass(frozen=True)
class _Point:
    """Gradient and negative Hessian of log Z at ``(t, tau)``; without `noise`, tau is fixed."""

    t: Tensor
    tau: Tensor
    gradient: Tensor
    size: Tensor
    rounding: float | Tensor  # of the gradient
    bend: Tensor  # (K,) where the groups do not interact, (K, K) where they do
    noise: _Noise | None

    def converged(self, tolerance: float) -> bool:
        small = bool((self.gradient.abs() <= tolerance * self.size + self.rounding).all())
        return small and (
            self.noise is None or bool(self.noise.gradient.abs() <= tolerance * self.noise.size)
        )

    def gradient_norm(self) -> float:
        parts = [self.gradient] if self.noise is None else [self.gradient, self.noise.gradient.reshape(1)]
        return float(torch.cat(parts).norm())

    def slope(self, step: Tensor, step_noise: Tensor) -> float:
        """The derivative of log Z along a step."""
        slope = self.gradient @ step
        return float(slope if self.noise is None else slope + self.noise.gradient * step_noise)

    def step(self) -> tuple[Tensor, Tensor]:
        """Newton's step in t and tau, by the Schur complement of tau."""
        step = self._solve(self.gradient)
        if self.noise is None:
            return step, torch.zeros_like(self.tau)
        coupled = self._solve(self.noise.coupling)
        residual = self.noise.gradient - self.noise.coupling @ step
        step_noise = residual / (self.noise.bend - self.noise.coupling @ coupled)
        return step - coupled * step_noise, step_noise

    def _solve(self, b: Tensor) -> Tensor:
        """Without a step in groups that log Z does not depend on, whose curvature and scatter are zero."""
        if self.bend.ndim == 1:
            return b / torch.where(self.bend == 0, 1.0, self.bend)
        return torch.linalg.solve(self.bend + torch.diag((self.bend.diagonal() == 0).to(b)), b)


def maximise(
    evidence: Evidence,
    prior: GroupedPrior,
    sigma_noise: float,
    *,
    optimize_noise: bool = False,
    tolerance: float = 1e-9,
    max_steps: int = 200,
    progress_bar: bool = False,
) -> Optimum:
    """Newton's method on the logarithms of the prior precisions (and of the noise variance).

    Args:
        evidence: the function to maximise.
        prior: its precision is where to start; the groups say which coordinates share one.
        sigma_noise: the noise scale, or where to start with it.
        optimize_noise: whether the noise scale is a variable.
        tolerance: largest gradient allowed, relative to the terms it is the difference of.
        max_steps: Newton steps before giving up.
        progress_bar: whether to show one; a search ends long before `max_steps`.

    Raises:
        UnsupportedError: if the prior cuts through blocks of a curvature that is not dense, or these have no known
            eigenvalues.
        NoFiniteOptimumError: if log Z increases without end towards zero or infinity in some hyperparameter.
        ConvergenceError: if `max_steps` do not suffice.
        LostPriorError: if the prior precision at the maximum is lost in the rounding of the curvature.
    """
    objective = _Objective.of(evidence, prior, optimize_noise)
    _check_optimum_exists(objective)
    t = prior.precision.detach().double().log()
    tau = torch.tensor(sigma_noise, dtype=torch.float64, device=t.device).square().log()
    steps_before = 0
    if objective.eigenvalues is None:
        # The shared optimum is cheap to find from the eigenvalues; from there no matrix is badly conditioned.
        shared = replace(prior, precision=prior.precision[:1], groups=torch.zeros_like(prior.groups))
        coarse = maximise(evidence, shared, sigma_noise, optimize_noise=optimize_noise, max_steps=max_steps)
        t = coarse.prior_precision.log().expand(len(t))
        tau = torch.tensor(float(coarse.sigma_noise), dtype=torch.float64, device=t.device).square().log()
        steps_before = coarse.steps
    elif (binned := objective.binned()) is not None:
        near, steps_before = _climbed(binned, binned.at(t, tau), tolerance, max_steps, progress_bar=False)
        t, tau = near.t, near.tau
    point, steps = _climbed(objective, objective.at(t, tau), tolerance, max_steps, progress_bar)
    noise = float((point.tau / 2).exp()) if optimize_noise else sigma_noise
    best = replace(prior, precision=point.t.exp())
    value = float(evidence.log_marginal_likelihood(best, (point.tau / 2).exp()))
    return Optimum(best.precision, noise, value, point.gradient_norm(), steps_before + steps)


def climb(
    evidence: Evidence,
    prior: GroupedPrior,
    sigma_noise: float,
    *,
    optimize_noise: bool,
    n_steps: int,
    max_step: float,
) -> tuple[Float[Tensor, " K"], float]:
    """Newton steps that are cut to `max_step` in any logarithm: towards the maximum, whether there is one or not.

    Args:
        evidence: the function to increase.
        prior: its precision is where to start.
        sigma_noise: likewise.
        optimize_noise: whether the noise scale is a variable.
        n_steps: how many.
        max_step: at most `SURE_STEP`, so that each increases log Z.

    Returns:
        The prior precisions and the noise scale.

    Raises:
        UnsupportedError: if the prior cuts through blocks of a curvature that is not dense, or these have no known
            eigenvalues.
    """
    objective = _Objective.of(evidence, prior, optimize_noise)
    t = prior.precision.detach().double().log()
    tau = torch.tensor(sigma_noise, dtype=torch.float64, device=t.device).square().log()
    for _ in range(n_steps):
        step, step_noise = objective.at(t, tau).step()
        length = float(torch.maximum(step.abs().max(), step_noise.abs()))
        fraction = 1.0 if length <= max_step else max_step / length
        t, tau = t + fraction * step, tau + fraction * step_noise
    return t.exp(), float((tau / 2).exp()) if optimize_noise else sigma_noise


def _climbed(
    objective: _Objective, point: _Point, tolerance: float, max_steps: int, progress_bar: bool
) -> tuple[_Point, int]:
    """The maximum, and the number of steps to it."""
    for steps in tqdm(range(max_steps), desc="Newton steps, at most", disable=not progress_bar):
        if point.converged(tolerance):
            return point, steps
        point = _ascend(objective, point)
    raise ConvergenceError(
        f"the prior precision did not converge in {max_steps} steps (gradient norm "
        f"{point.gradient_norm():.1e}); raise max_steps, or check that the model was trained"
    )


def _ascend(objective: _Objective, point: _Point) -> _Point:
    """One Newton step: as long as log Z is seen to grow, or so short that it does."""
    step, step_noise = point.step()
    length = float(torch.maximum(step.abs().max(), step_noise.abs()))
    fraction = min(1.0, MAX_STEP / length)
    while fraction * length > SURE_STEP:
        try:
            found = objective.at(point.t + fraction * step, point.tau + fraction * step_noise)
            if found.slope(step, step_noise) >= 0:  # log Z is concave: it has grown all the way
                return found
        except NotPositiveDefiniteError:
            pass  # so close to a singular matrix that it cannot be the maximum
        fraction /= 2
    return objective.at(point.t + fraction * step, point.tau + fraction * step_noise)


@dataclass(frozen=True)
class _Objective:
    """log Z as a function of t and tau.

    Attributes:
        evidence: what it depends on besides.
        prior: the groups.
        eigenvalues: those of H, where no block is cut by a change of the prior.
        squares: the squared deviation from the prior mean in each group.
        with_noise: whether tau is a variable.
    """

    evidence: Evidence
    prior: GroupedPrior
    eigenvalues: GroupedEigenvalues | DampedEigenvalues | None
    squares: Float[Tensor, " K"]
    with_noise: bool

    @classmethod
    def of(cls, evidence: Evidence, prior: GroupedPrior, with_noise: bool) -> _Objective:
        """The function, with what does not depend on t and tau computed.

        Raises:
            UnsupportedError: if the prior cuts through blocks of a curvature that is not dense, or these have no known
            eigenvalues.
        """
        spectrum = evidence.relevant_spectrum(prior)
        if spectrum is None and not isinstance(evidence.curvature.total, Dense):
            raise UnsupportedError(_refusal(evidence))
        eigenvalues = None if spectrum is None else _eigenvalues(evidence, spectrum, prior)
        return cls(evidence, prior, eigenvalues, prior.squares, with_noise)

    def binned(self) -> _Objective | None:
        """The same function but for the eigenvalues, of which there are fewer."""
        fewer = None if self.eigenvalues is None else self.eigenvalues.binned
        return None if fewer is None else replace(self, eigenvalues=fewer)

    def at(self, t: Tensor, tau: Tensor) -> _Point:
        """The first two derivatives at ``(t, tau)``."""
        precision, scale = t.exp(), self.evidence.scale((tau / 2).exp())
        gamma, B = self._effective_parameters(precision, scale)
        if self.evidence.left_out is not None:
            ratio = self.evidence.left_out_ratio(precision, (tau / 2).exp())
            gamma, B = gamma + ratio, B + ratio
        scatter = self.squares * precision
        noise = None
        if self.with_noise:
            slope, curve = _noise_derivatives(self.evidence, tau)
            by_group = B if B.ndim == 1 else B.sum(1)
            total = gamma.sum() / 2
            noise = _Noise(slope + total, total - curve, by_group.sum() / 2 - curve, by_group / 2)
        return _Point(
            t,
            tau,
            gradient=(gamma - scatter) / 2,
            size=(gamma + scatter) / 2,
            rounding=ROUNDING * self.prior.sizes if self.eigenvalues is None else 0.0,
            bend=(B + (scatter if B.ndim == 1 else torch.diag(scatter))) / 2,
            noise=noise,
        )

    def _effective_parameters(self, precision: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``gamma`` and ``B`` of the module's docstring; B is a vector where the groups do not interact."""
        if self.eigenvalues is not None:
            return self.eigenvalues.effective(precision, scale)
        prior, groups, zeros = (
            replace(self.prior, precision=precision),
            self.prior.groups,
            torch.zeros_like(precision),
        )
        H = self.evidence.curvature.total.to(torch.float64)
        P = scale * H + prior.operator(H)
        covariance = P.solve(torch.eye(P.size, dtype=torch.float64, device=P.device))
        free = precision * zeros.index_add(0, groups, covariance.diagonal())
        squares = zeros.new_zeros(len(zeros), P.size).index_add(0, groups, covariance.square())
        squares = zeros.new_zeros(len(zeros), len(zeros)).index_add(1, groups, squares)
        return prior.sizes - free, torch.diag(free) - torch.outer(precision, precision) * squares


def _eigenvalues(
    evidence: Evidence, spectrum: Spectrum, prior: GroupedPrior
) -> GroupedEigenvalues | DampedEigenvalues:
    n_groups = len(prior.precision)
    if evidence.curvature.damped is not None:
        return DampedEigenvalues(spectrum, prior.groups)
    shared = evidence.curvature.eigenvalues if n_groups == 1 else None
    return shared or GroupedEigenvalues.of(spectrum, prior.groups, n_groups)


def _refusal(evidence: Evidence) -> str:
    """Why log Z is no function of eigenvalues here, and with which prior it would be."""
    kind, known = type(evidence.curvature.total).__name__, evidence.curvature.spectrum
    if known is None:
        return (
            f"the eigenvalues of the curvature (a {kind}) are not known, which a search needs; use "
            "hessian_structure='full', or method='gridsearch'"
        )
    if bool((known.block == known.block[0]).all()):
        return (
            f"this prior structure cuts through blocks of the curvature (a {kind}), which is one block of all "
            "parameters; use prior_structure='scalar', or hessian_structure='full'"
        )
    return (
        f"this prior structure cuts through blocks of the curvature (a {kind}), expected one that does not; use "
        "prior_structure='scalar', 'modulewise' or 'layerwise', whichever gives each block one precision, or "
        "hessian_structure='full'"
    )


def _check_optimum_exists(objective: _Objective) -> None:
    evidence, prior, squares = objective.evidence, objective.prior, objective.squares
    # What is left out outweighs what diverges below.
    left_out = 0.0 if evidence.left_out is None else float(evidence.left_out.sum())
    if bool((squares == 0).any()):
        k = int((squares == 0).nonzero()[0])
        raise NoFiniteOptimumError(
            f"{prior.label(k)} equals the prior mean exactly, so that the log marginal likelihood grows "
            "without end in its prior precision; train the model, or fix prior_precision"
        )
    if isinstance(objective.eigenvalues, GroupedEigenvalues):
        informed = torch.tensor(objective.eigenvalues.sizes).to(squares)
    else:
        diagonal = evidence.curvature.total.diagonal().double()
        informed = torch.zeros_like(squares).index_add(0, prior.groups, diagonal)
    if left_out == 0 and bool((informed <= 0).any()):
        k = int((informed <= 0).nonzero()[0])
        raise NoFiniteOptimumError(
            f"the curvature of {prior.label(k)} is zero, so that the log marginal likelihood grows without "
            "end as its prior precision goes to zero; fix prior_precision, or leave it out with "
            "subset_of_weights"
        )
    if (
        left_out == 0
        and objective.with_noise
        and bool(_noise_derivatives(evidence, squares.new_zeros(()))[1] >= 0)
    ):
        raise NoFiniteOptimumError(
            "the residuals are all zero, so that the log marginal likelihood grows without end as "
            "sigma_noise goes to zero; fix sigma_noise"
        )


def _noise_derivatives(evidence: Evidence, tau: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the tempered log-likelihood in tau."""
    with torch.enable_grad():
        variable = tau.detach().requires_grad_()
        fit = evidence.log_likelihood((variable / 2).exp())
        (slope,) = torch.autograd.grad(fit, variable, create_graph=True)
        (curve,) = torch.autograd.grad(slope, variable)
    return slope.detach(), curve
