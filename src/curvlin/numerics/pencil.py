"""Simultaneous diagonalisation of the one or two matrices that stand on one side of a Kronecker sum.

One matrix M: ``M = Q diag(lambda) Q^T``. Two matrices M1, M2 (both may be singular, their sum may not): with
``S = M1 / tr M1 + M2 / tr M2 = L L^T`` and ``L^-1 (M1 / tr M1) L^-T = Q diag(c) Q^T``, ``0 <= c <= 1``,

    M1 = Y diag(c tr M1) Y^T,    M2 = Y diag((1 - c) tr M2) Y^T,    Y = L Q,

which treats the two alike, whichever comes first (Golub & Van Loan, Matrix Computations, 8.7). With roots
``M = R^T R`` at hand, L and c come from a QR of the stacked roots and an SVD (the generalised SVD of Van Loan 1976),
which never squares a condition number. O(n^3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin._tree import Tree, tensor_field
from curvlin.errors import NotPositiveDefiniteError
from curvlin.numerics.cholesky import normalised_cholesky
from curvlin.numerics.rounding import without_rounding
from curvlin.numerics.scaling import power_of_two


@dataclass(eq=False, repr=False)
class Side(Tree):
    """``M_t = Y diag(spectra[t]) Y^T`` for every matrix on this side, with ``Y = L Q`` and ``X = Y^-T``.

    ``None`` stands for an identity: a basis that is None rotates nothing, a `lower` that is None whitens nothing.
    """

    spectra: tuple[Tensor, ...] = tensor_field(1)
    orthogonal: Tensor | None = tensor_field(2)
    lower: Tensor | None = tensor_field(2)
    solve_basis: Tensor | None = tensor_field(2)

    def logdet_whitening(self) -> Tensor | float:
        """``log |det L|``."""
        if self.lower is None:
            return 0.0
        return self.lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def diagonalise(
    matrices: Sequence[Tensor | None],
    roots: Sequence[Tensor | None],
    resolution: float,
    where: str,
    ones: Tensor,
) -> Side:
    """Diagonalise the matrices of one side; None is the identity.

    Args:
        matrices: one per term, ``(..., n, n)`` in float64; at most two different from the identity, and at most one
            if an identity stands beside them.
        roots: R with ``M`` a positive multiple of ``R^T R``, ``(..., m, n)``, for each matrix where it is known.
        resolution: relative rounding of the entries; what it can have made of a zero eigenvalue is zero.
        where: the name under which a failure is reported.
        ones: the eigenvalues of the identity, ``(n,)``.

    Raises:
        NotPositiveDefiniteError: if two matrices share a null direction, or their sum is indefinite.
    """
    general = [i for i, M in enumerate(matrices) if M is not None]
    if not general:
        return Side((ones,) * len(matrices), None, None, None)
    if len(general) == 1:
        matrix, root = matrices[general[0]], roots[general[0]]
        assert matrix is not None
        spectrum, Q = _eigen(matrix, root, resolution)
        return Side(tuple(spectrum if i in general else ones for i in range(len(matrices))), Q, None, Q)
    first, second = (matrices[i] for i in general)
    root1, root2 = (roots[i] for i in general)
    assert first is not None and second is not None
    return _pencil(first, second, root1, root2, resolution, where)


def _eigen(M: Tensor, root: Tensor | None, resolution: float) -> tuple[Tensor, Tensor]:
    scale = power_of_two(M)[..., None]
    if root is None:
        spectrum, Q = torch.linalg.eigh(M / scale[..., None])
        return without_rounding(spectrum, resolution) * scale, Q
    _, singular, Vh = torch.linalg.svd(_unit(root), full_matrices=True)
    spectrum = torch.zeros_like(M[..., 0])
    spectrum[..., : singular.shape[-1]] = without_rounding(singular, resolution).square()
    return spectrum * _trace(M)[..., None], Vh.mT


def _unit(root: Tensor) -> Tensor:
    """The root scaled to unit Frobenius norm: the root of ``M / tr M``."""
    norm = root.square().sum((-2, -1), keepdim=True).sqrt()
    return root / torch.where(norm > 0, norm, 1.0)


def _pencil(
    M1: Tensor, M2: Tensor, R1: Tensor | None, R2: Tensor | None, resolution: float, where: str
) -> Side:
    trace1, trace2 = _trace(M1), _trace(M2)
    if R1 is not None and R2 is not None:
        lower, Q, c1, c2 = _from_roots(_unit(R1), _unit(R2), where)
    else:
        lower, Q, c1, c2 = _sum_whitened(
            M1 / trace1[..., None, None], M2 / trace2[..., None, None], where, resolution
        )
    c1, c2 = (without_rounding(c, resolution) for c in (c1, c2))
    solve_basis = torch.linalg.solve_triangular(lower.mT, Q, upper=True)
    return Side((c1 * trace1[..., None], c2 * trace2[..., None]), Q, lower, solve_basis)


def _trace(M: Tensor) -> Tensor:
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(trace > 0, trace, torch.ones_like(trace))


def _sum_whitened(
    N1: Tensor, N2: Tensor, where: str, resolution: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lower, scale = normalised_cholesky(N1 + N2, where)
    lower = lower * scale.sqrt()[..., None, None]
    half = torch.linalg.solve_triangular(lower, N1, upper=False)
    C = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    c, Q = torch.linalg.eigh((C + C.mT) / 2)
    # Rounding in the entries of N1 and N2 reaches c multiplied by the condition of their sum.
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    amplification = (pivots.amax(-1) / pivots.amin(-1)).square()[..., None]
    noise = 10 * c.shape[-1] * resolution * amplification
    c1 = torch.where((c < 0) & (c > -noise), 0.0, c)
    c2 = torch.where((c > 1) & (c < 1 + noise), 0.0, 1 - c)
    return lower, Q, c1, c2


def _from_roots(R1: Tensor, R2: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stacked = torch.cat([R1, R2], dim=-2)
    if stacked.shape[-2] < stacked.shape[-1]:
        raise NotPositiveDefiniteError(where, 0.0)
    basis, upper = torch.linalg.qr(stacked)
    signs = upper.diagonal(dim1=-2, dim2=-1).sign()
    upper = upper * signs[..., None]
    basis = basis * signs[..., None, :]
    pivots = upper.diagonal(dim1=-2, dim2=-1)
    tiny = upper.shape[-1] * torch.finfo(upper.dtype).eps
    if not bool((pivots > tiny * pivots.amax(-1, keepdim=True)).all()):
        raise NotPositiveDefiniteError(where, float(pivots.min()))
    Q1, Q2 = basis.split([R1.shape[-2], R2.shape[-2]], dim=-2)
    _, _, Vh = torch.linalg.svd(Q1, full_matrices=True)
    V = Vh.mT
    # c = cos^2 and 1 - c = sin^2, each from its own columns: neither is a difference.
    return upper.mT, V, (Q1 @ V).square().sum(-2), (Q2 @ V).square().sum(-2)
