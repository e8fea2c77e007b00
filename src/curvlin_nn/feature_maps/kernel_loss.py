"""How far ``F F^T`` is from a kernel: the squared Frobenius distance in the space of the features.

With the rows of n samples side by side in F ``(R, K)``, a kernel in factors ``Y Y^T``, Y ``(R, S)``, is never formed:

    |Y Y^T - F F^T|^2 = |F^T F|^2 - 2 |F^T Y|^2 + |Y^T Y|^2

costs ``R (K + S)^2`` multiplications in the place of ``R^2 (K + S)``. The same holds of a kernel whose blocks between
groups of rows are set to zero (Eq. 9 of the paper): its factors stand in a sum over the groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def distance_to_factors(
    F: Float[Tensor, "R K"], Y: Float[Tensor, "R S"], groups: Sequence[int] = ()
) -> Float[Tensor, ""]:
    """``|M o (Y Y^T) - F F^T|_F^2``, where M is one within a group of rows and zero between groups.

    Args:
        F: the rows of features of all samples.
        Y: the rows of the kernel's factors; of random probes, divided by the root of their number.
        groups: the numbers of rows of consecutive groups; none for one group of all rows.

    Returns:
        The distance, differentiable in F. Its gradient is linear in ``Y Y^T``: unbiased where this is.
    """
    cross, own = F.new_zeros(()), F.new_zeros(())
    for f, y in zip(F.split([*groups] or len(F)), Y.split([*groups] or len(Y)), strict=True):
        cross = cross + (f.mT @ y).square().sum()
        own = own + (y.mT @ y).square().sum()
    return (F.mT @ F).square().sum() - 2 * cross + own


def distance_to_gram(
    F: Float[Tensor, "R K"], gram: Float[Tensor, "R R"], groups: Sequence[int] = ()
) -> Float[Tensor, ""]:
    """``|M o gram - F F^T|_F^2`` for a kernel that is at hand; see `distance_to_factors`."""
    cross, own, start = F.new_zeros(()), F.new_zeros(()), 0
    for f in F.split([*groups] or len(F)):
        block = gram[start : start + len(f), start : start + len(f)]
        cross = cross + (f * (block @ f)).sum()
        own = own + block.square().sum()
        start += len(f)
    return (F.mT @ F).square().sum() - 2 * cross + own


def relative_error(F: Float[Tensor, "R K"], gram: Float[Tensor, "R R"]) -> float:
    """``|gram - F F^T|_F / |gram|_F``, in float64."""
    F, gram = F.detach().double(), gram.detach().double()
    return float(torch.linalg.matrix_norm(gram - F @ F.mT) / torch.linalg.matrix_norm(gram))


def least_error(gram: Float[Tensor, "R R"], rank: int) -> float:
    """The relative error of the best ``F F^T`` of this rank: what is left of the spectrum (Eckart and Young)."""
    eigenvalues = torch.linalg.eigvalsh(gram.detach().double()).clamp(min=0)
    left_out = eigenvalues[: max(len(eigenvalues) - rank, 0)]
    return float(left_out.norm() / eigenvalues.norm())
