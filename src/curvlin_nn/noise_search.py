"""The prior precision and one noise scale for each output that maximise the log marginal likelihood.

With ``tau_c = log sigma_c^2`` the determinant of ``P = sum_c H_c / sigma_c^2 + P0`` is still a sum of exponentials of
linear functions with coefficients that are not negative, each H_c being PSD. So log Z is concave in all logarithms, and
Newton's method climbs it as in `prior_search`. No eigenvectors stay as sigma changes: derivatives are by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvlin import NotPositiveDefiniteError
from curvlin_nn.errors import ConvergenceError, NoFiniteOptimumError
from curvlin_nn.evidence import Evidence
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.prior import GroupedPrior
from curvlin_nn.prior_search import MAX_STEP, SURE_STEP, Optimum, maximise

_Function = Callable[[Tensor], Tensor]

LAST_STEP = 1e-6
"""A Newton step this short is the last: it squares its error."""

LOST = torch.finfo(torch.float64).eps / LAST_STEP
"""Derivatives this small have a Newton step that rounding moves by more than the last one is long."""


@outside_inference_mode()
def maximise_by_output(
    evidence: Evidence,
    prior: GroupedPrior,
    sigma_noise: Float[Tensor, " C"],
    optimize_noise: bool = False,
    max_steps: int = 200,
    progress_bar: bool = False,
) -> Optimum:
    """Newton's method on the logarithms of the prior precisions (and of the noise variances); see `maximise`.

    The search begins at the optimum with one noise scale for all outputs, where that is a variable.

    Raises:
        NoFiniteOptimumError: if log Z increases without end towards zero or infinity in some hyperparameter.
        ConvergenceError: if `max_steps` do not suffice.
    """
    squares = evidence.statistics[1:]
    fitted = squares == 0
    if evidence.left_out is not None:
        fitted = fitted & (evidence.left_out == 0)
    if optimize_noise and bool(fitted.any()):
        raise NoFiniteOptimumError(
            f"the residuals of output {int(fitted.nonzero()[0])} are all zero, so that the log marginal "
            "likelihood grows without end as its sigma_noise goes to zero; fix sigma_noise"
        )
    common = float(sigma_noise.detach().double().log().mean().exp())
    shared = maximise(evidence, prior, common, optimize_noise=optimize_noise, max_steps=max_steps)
    n_groups, fixed = len(prior.precision), sigma_noise.detach().double()

    def value(u: Tensor) -> Tensor:
        sigma = (u[n_groups:] / 2).exp() if optimize_noise else fixed
        return evidence.value(replace(prior, precision=u[:n_groups].exp()), sigma)

    u = shared.prior_precision.log()
    if optimize_noise:
        u = torch.cat([u, torch.full_like(squares, 2 * math.log(float(shared.sigma_noise)))])
    for steps in tqdm(range(max_steps), desc="Newton steps, at most", disable=not progress_bar):
        found, gradient, hessian = _derivatives(value, u)
        step = _newton_step(gradient, hessian)
        length = float(step.abs().max())
        if length <= LAST_STEP:
            u = u + step
            found, gradient, _ = _derivatives(value, u)
            sigma = (u[n_groups:] / 2).exp() if optimize_noise else fixed
            return Optimum(
                u[:n_groups].exp(), sigma, float(found), float(gradient.norm()), shared.steps + steps + 1
            )
        u = _ascended(value, u, float(found), step, length)
    raise ConvergenceError(
        f"the prior precision did not converge in {max_steps} steps (gradient norm {float(gradient.norm()):.1e}); "
        "raise max_steps, or check that the model was trained"
    )


def _newton_step(gradient: Tensor, hessian: Tensor) -> Tensor:
    """Newton's step, with none in logarithms in which log Z is flat but for rounding.

    Such is the precision of a parameter without influence, as the bias of the keys in attention.
    """
    flat = torch.maximum(gradient.abs(), hessian.diagonal().abs()) <= LOST
    bend = torch.where(flat | flat[:, None], 0.0, -hessian) + torch.diag(flat.to(hessian))
    step: Tensor = torch.linalg.solve(bend, torch.where(flat, 0.0, gradient))
    return step


def _ascended(value: _Function, u: Tensor, here: float, step: Tensor, length: float) -> Tensor:
    """One Newton step: as long as log Z is seen to grow, or so short that it does."""
    fraction = min(1.0, MAX_STEP / length)
    while fraction * length > SURE_STEP:
        try:
            if float(value(u + fraction * step)) >= here:
                break
        except NotPositiveDefiniteError:
            pass  # so close to a singular matrix that it cannot be the maximum
        fraction /= 2
    return u + fraction * step


def _derivatives(value: _Function, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian."""
    with torch.enable_grad():
        variable = u.detach().requires_grad_()
        found = value(variable)
        (gradient,) = torch.autograd.grad(found, variable, create_graph=True)
        rows = [torch.autograd.grad(slope, variable, retain_graph=True)[0] for slope in gradient]
    return found.detach(), gradient.detach(), torch.stack(rows)
