"""Conjugate gradients and MINRES for many right-hand sides at once, held to the residual that they leave.

The residual of a short recurrence drifts away from ``b - P x``. So each method runs until its own residual says
that it is done, the true one is computed, and the method starts again on it where it is too large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from curvlin.errors import NotPositiveDefiniteError
from curvlin.iterative.results import CONVERGED, ITERATION_LIMIT, STAGNATED, Solution
from curvlin.precision.base import PrecisionOperator

LinearMap = Callable[[Tensor], Tensor]

ROUNDINGS = 100.0
"""What is smaller than this many roundings of P is rounding."""


@dataclass(frozen=True)
class Whitening:
    """A preconditioner ``M = R R^T`` as maps of columns: ``M^-1``, ``R``, ``R^-1`` and ``R^-T``."""

    solve: LinearMap
    root_matvec: LinearMap
    root_solve: LinearMap
    unwhiten: LinearMap

    @classmethod
    def by(cls, M: PrecisionOperator | None) -> Whitening:
        """That of an operator; of the identity for None."""
        if M is None:
            return cls(_itself, _itself, _itself, _itself)
        return cls(M.solve, *(_by_columns(root) for root in (M.root_matvec, M.root_solve, M.unwhiten)))

    def whitened(self, product: LinearMap) -> LinearMap:
        """``R^-1 P R^-T``, whose spectrum is that of ``M^-1 P``."""
        return lambda Z: self.root_solve(product(self.unwhiten(Z)))


@dataclass(frozen=True)
class Settings:
    """How a solve is made: see `IterativePrecision.solve`."""

    method: str
    rtol: float
    max_iterations: int
    progress_bar: bool


def solve(product: LinearMap, B: Tensor, whitening: Whitening, settings: Settings) -> Solution:
    """``P X = B`` to ``|B - P X| <= rtol |B|`` in every column, ``(D, K)``."""
    run, rtol = METHODS[settings.method], settings.rtol
    lengths = torch.linalg.vector_norm(B, dim=0, dtype=torch.float64)
    if not bool(torch.isfinite(lengths).all()):
        raise ValueError("the right-hand side must be finite, found NaN or Inf")
    B = B / torch.where(lengths > 0, lengths, 1.0).to(B.dtype)  # squares of any scale are representable now
    X, residual, left = torch.zeros_like(B), B, norms(B)
    iterations, ended = 0, CONVERGED
    with bar(settings.progress_bar, settings.method) as progress:
        while ended == CONVERGED and bool((unsolved := left > rtol).any()):
            scale = torch.where(unsolved, left, 1.0)
            # Half of the tolerance, so that a residual that drifted a little need not be done again.
            step, used = run(
                product,
                residual * (unsolved / scale).to(B.dtype),
                whitening,
                torch.where(unsolved, 0.5 * rtol / scale, 1.0),
                settings.max_iterations - iterations,
                progress,
            )
            iterations += used
            X_now = X + step * scale.to(B.dtype)
            residual_now = B - product(X_now)
            left_now = norms(residual_now)
            if iterations >= settings.max_iterations:
                ended = ITERATION_LIMIT
            elif bool((left_now > 0.5 * left).logical_and(left_now > rtol).any()):
                ended = STAGNATED
            better = left_now < left
            X, residual = torch.where(better, X_now, X), torch.where(better, residual_now, residual)
            left = torch.where(better, left_now, left)
        if bool((left <= rtol).all()):
            ended = CONVERGED
    return Solution(X * lengths.to(B.dtype), left, iterations, ended)


def conjugate_gradients(
    product: LinearMap,
    B: Tensor,
    whitening: Whitening,
    rtol: Tensor,
    max_iterations: int,
    progress: tqdm[None],
) -> tuple[Tensor, int]:
    """Preconditioned conjugate gradients from zero, for columns of norm one (or zero).

    Raises:
        NotPositiveDefiniteError: if a direction of negative curvature is met.
    """
    X, R = torch.zeros_like(B), B.clone()
    Z = whitening.solve(R)
    direction, rho = Z.clone(), dot(R, Z)
    active = norms(R) > rtol
    for iteration in range(1, max_iterations + 1):
        image = product(direction)
        curvature = dot(direction, image)
        if bool((active & ~(curvature > 0)).any()):
            quotients = curvature / dot(direction, direction)
            raise NotPositiveDefiniteError("IterativePrecision", float(quotients[active].min()))
        alpha = torch.where(active, rho / torch.where(active, curvature, 1.0), 0.0).to(B.dtype)
        X.addcmul_(direction, alpha)
        R.addcmul_(image, alpha, value=-1)
        progress.update()
        active = norms(R) > rtol
        if not bool(active.any()):
            return X, iteration
        Z = whitening.solve(R)
        rho, previous = dot(R, Z), rho
        beta = torch.where(active, rho / torch.where(previous > 0, previous, 1.0), 0.0).to(B.dtype)
        direction.mul_(beta).add_(Z)
    return X, max_iterations


def minres(
    product: LinearMap,
    B: Tensor,
    whitening: Whitening,
    rtol: Tensor,
    max_iterations: int,
    progress: tqdm[None],
) -> tuple[Tensor, int]:
    """MINRES from zero, in coordinates whitened by the preconditioner (Paige & Saunders 1975).

    Smallest residual at every iteration, in the whitened norm; also for singular and indefinite P. A column stops where
    it has converged, or where ``|P r|`` is beneath the root of rounding: without a solution, steps beyond that go off
    along the null space.
    """
    apply, y = whitening.whitened(product), whitening.root_solve(B)
    dtype, eps = y.dtype, torch.finfo(y.dtype).eps
    rounding = ROUNDINGS * eps
    beta1 = norms(y)
    beta, previous_beta, size = beta1, torch.ones_like(beta1), torch.zeros_like(beta1)
    r1 = r2 = y
    dbar, epsilon, phibar = torch.zeros_like(beta), torch.zeros_like(beta), beta1
    cs, sn = -torch.ones_like(beta), torch.zeros_like(beta)
    w = w2 = x = torch.zeros_like(y)
    done = beta1 == 0
    iteration = 0
    for iteration in range(1, max_iterations + 1):
        v = y * torch.where(done, 0.0, safe_inverse(beta)).to(dtype)
        y = apply(v)
        if iteration > 1:
            y = y - (beta / previous_beta).to(dtype) * r1
        alpha = dot(v, y)
        y = y - (alpha * safe_inverse(beta)).to(dtype) * r2
        r1, r2 = r2, y
        previous_beta, beta = torch.where(beta > 0, beta, 1.0), norms(y)
        size = torch.maximum(size, alpha.abs() + beta)  # of P along the space so far
        # One more rotation turns the tridiagonal matrix triangular.
        old_epsilon, delta, gbar = epsilon, cs * dbar + sn * alpha, sn * dbar - cs * alpha
        epsilon, dbar = sn * beta, -cs * beta
        gamma = torch.hypot(gbar, beta)
        done = done | (gamma <= rounding * size) | (torch.hypot(gbar, dbar) <= eps**0.5 * size)
        cs, sn = gbar * safe_inverse(gamma), beta * safe_inverse(gamma)
        phi, phibar = cs * phibar, sn * phibar
        w1, w2 = w2, w
        w = v - old_epsilon.to(dtype) * w1 - delta.to(dtype) * w2
        w = w * safe_inverse(gamma).to(dtype)
        x = torch.where(done, x, x + phi.to(dtype) * w)
        progress.update()
        done = done | (phibar <= rtol * beta1) | (beta <= rounding * size)
        if bool(done.all()):
            break
    return whitening.unwhiten(x), iteration


METHODS = {"cg": conjugate_gradients, "minres": minres}


def dot(X: Tensor, Y: Tensor) -> Tensor:
    """Inner products of columns, summed in float64."""
    return (X * Y).sum(0, dtype=torch.float64)


def norms(X: Tensor) -> Tensor:
    """Norms in float64 of columns whose squares are representable."""
    return dot(X, X).sqrt()


def safe_inverse(t: Tensor) -> Tensor:
    """``1 / t``, and 0 for 0."""
    return torch.where(t != 0, 1 / torch.where(t != 0, t, 1.0), 0.0)


def bar(shown: bool, what: str) -> tqdm[None]:
    """A progress bar that counts products with a block."""
    return tqdm(disable=not shown, desc=what, unit=" products")


def _itself(X: Tensor) -> Tensor:
    return X


def _by_columns(by_rows: LinearMap) -> LinearMap:
    return lambda X: by_rows(X.mT).mT
