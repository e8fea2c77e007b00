"""Stochastic Lanczos quadrature: ``log det(S + shift)`` for many shifts from one Krylov space.

    tr log S = E[z^T log(S) z],    z^T log(S) z ~ sum_j (v_j^T C e)^2 log theta_j

with Ritz values theta of block Lanczos started at random signs z (Ubaru, Chen & Saad 2017). Gauss quadrature of the
logarithm errs from above and by less with every product, so the changes from one to the next bound what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError
from curvlin.iterative.krylov import LinearMap, bar
from curvlin.iterative.lanczos import KrylovSpace, block_lanczos, remaining
from curvlin.iterative.results import Estimate, estimate

ENOUGH = 0.01
"""Quadrature ends when it may change the mean by this part of a standard error."""


@dataclass(frozen=True)
class Quadrature:
    """``tr log(S + shift)`` for each shift, and the space it came from."""

    estimate: Estimate
    space: KrylovSpace


def log_quadrature(S: LinearMap, Z: Tensor, shifts: Tensor, max_steps: int, progress_bar: bool) -> Quadrature:
    """Lanczos steps until quadrature is exact enough for the noise of the probes, or `max_steps`.

    A Krylov space that is all of R^D leaves nothing to chance: the answer is exact.

    Raises:
        NotPositiveDefiniteError: if a Ritz value, hence an eigenvalue, is negative.
    """
    mean, changes = shifts, [shifts]
    products, look = 0, 1
    with bar(progress_bar, "log-determinant") as progress:
        for step, space in enumerate(block_lanczos(S, Z), start=1):
            products += space.blocks[-1].shape[-1]
            progress.update()
            last = space.exhausted or step == max_steps
            if step < look and not last:
                continue
            look = step + max(1, step // 8)  # each look decomposes T again
            samples = _forms(space, shifts)
            before, mean = mean, samples.mean(-1)
            changes = [*changes, (mean - before).abs()] if step > 1 else [mean.abs()]
            left = torch.zeros_like(mean) if space.exhausted else remaining(changes)
            found = estimate(samples, products, float(left.max()))
            if last or bool((left <= ENOUGH * found.standard_error).all()):
                break
    if len(space.T) == len(Z):
        exact = (torch.linalg.eigvalsh(space.T) + shifts.unsqueeze(-1)).log().sum(-1)
        found = Estimate(exact, torch.zeros_like(exact), 1, products)
    return Quadrature(found, space)


def _forms(space: KrylovSpace, shifts: Tensor) -> Tensor:
    theta, along = space.spectrum()
    lowest = float(theta.min() + shifts.min())
    if lowest <= 0:
        raise NotPositiveDefiniteError("IterativePrecision (in units of its preconditioner, if any)", lowest)
    return (theta + shifts.unsqueeze(-1)).log() @ along.square()
