"""Stochastic Lanczos quadrature: ``log det(S + shift)`` for many shifts from one Krylov space.

    tr log S = E[z^T log(S) z],    z^T log(S) z ~ sum_j (v_j^T C e)^2 log theta_j

with Ritz values theta of block Lanczos started at random signs z (Ubaru, Chen & Saad 2017). Gauss quadrature of the
logarithm errs from above and by less with every product, so the changes from one to the next bound what is left.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from curvlin.iterative.krylov import LinearMap, bar
from curvlin.iterative.lanczos import block_lanczos, positive, remaining
from curvlin.iterative.results import Estimate, estimate, exactly

ENOUGH = 0.01
"""Quadrature ends when it may change the mean by this part of a standard error."""


def log_quadrature(S: LinearMap, Z: Tensor, shifts: Tensor, max_steps: int, progress_bar: bool) -> Estimate:
    """``tr log(S + shift)`` for each shift: Lanczos until quadrature is as exact as the probes ask, or `max_steps`.

    A Krylov space that is all of R^D leaves nothing to chance: the answer is exact.

    Raises:
        NotPositiveDefiniteError: if a Ritz value, hence an eigenvalue, is negative.
    """
    means = [torch.zeros_like(shifts)]
    products, look = 0, 1
    with bar(progress_bar, "log-determinant") as progress:
        for step, space in enumerate(block_lanczos(S, Z), start=1):
            products += space.blocks[-1].shape[-1]
            progress.update()
            last = space.exhausted or step == max_steps
            if step < look and not last:
                continue
            look = step + max(1, step // 8)  # each look decomposes T again
            theta, _, along = space.spectrum()
            eigenvalues = positive(theta + shifts.unsqueeze(-1))
            samples = eigenvalues.log() @ along.square()
            means.append(samples.mean(-1))
            changes = [(now - before).abs() for before, now in pairwise(means)]
            left = torch.zeros_like(shifts) if space.exhausted else remaining(changes)
            found = estimate(samples, products, float(left.max()))
            if last or bool((left <= ENOUGH * found.standard_error).all()):
                break
    return exactly(eigenvalues.log().sum(-1), products) if len(theta) == len(Z) else found
