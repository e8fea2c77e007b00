"""The dual of a curvature: ``Phi Phi^T`` of its R rows, with the same eigenvalues but zeros, where R is small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import BlockFeatures
from curvlin.iterative.results import LowRankApproximation, exactly


def from_rows(rows: Sequence[BlockFeatures], rank: int) -> LowRankApproximation:
    """The best approximation of ``sum_n Phi_n^T Phi_n`` of this rank, by one eigendecomposition R x R.

    ``U = Phi^T Q`` for the leading eigenvectors Q of the dual, whose columns are as long as the roots of its
    eigenvalues; what is left of the trace is the sum of the other eigenvalues.
    """
    rows = [Phi.to(torch.float64) for Phi in rows]
    dual = kernel(rows)
    values, Q = torch.linalg.eigh(dual)
    kept = values[-rank:].flip(0) > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    Q = Q[:, -rank:].flip(1) * kept
    parts = Q.split([Phi.n_samples * Phi.n_rows for Phi in rows])
    U = torch.zeros(rows[0].size, Q.shape[1], dtype=torch.float64, device=Q.device)
    for Phi, part in zip(rows, parts, strict=True):
        U += Phi.T @ part.unflatten(0, (Phi.n_samples, Phi.n_rows))
    left = (dual.trace() - U.square().sum()).clamp(min=0.0)
    return LowRankApproximation(U, exactly(left, 0))


def kernel(rows: Sequence[BlockFeatures]) -> Float[Tensor, "R R"]:
    """The kernel between all rows, symmetric, by pairs of batches, in float64."""
    blocks: list[list[Tensor]] = [[] for _ in rows]
    for i, batch in enumerate(rows):
        Phi = batch.to(torch.float64)
        for j, Psi in enumerate(rows):
            if j < i:
                blocks[i].append(blocks[j][i].mT)
            else:
                pair = Phi.gram(None if i == j else Psi.to(torch.float64))
                blocks[i].append(pair.flatten(2, 3).flatten(0, 1))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])
