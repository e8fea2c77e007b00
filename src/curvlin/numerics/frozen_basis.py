"""Functions of a Kronecker sum in a basis held fixed, with exact first and second derivatives.

In the joint basis X (x) Y of its two sides, at the point where derivatives are taken,

    (X (x) Y)^T P (X (x) Y) = D + E,    D = sum_t diag(l_t) (x) diag(r_t) + shift = diag(d),
    E = sum_t L_t (x) diag(r_t) + diag(l_t) (x) R_t + L_t (x) R_t,

with l_t, r_t the diagonals of the rotated factors and L_t, R_t what they hold beside them: zero in value, but not in
its derivatives. With X and Y constants,

    log det P = const + log det D - tr (D^-1 E)^2 / 2               + O(E^3)
    P^-1      ~ D^-1 - D^-1 E D^-1 + D^-1 E D^-1 E D^-1             + O(E^3)

have the right derivatives up to the second, and no difference of eigenvalues is divided by. The terms of second
order are two steps with L while the index of Y stands still, two steps with R, or one of each; the work is at most
O((a + b)^2 ab), that of the first derivatives of a trace O((a + b) ab), in pieces no larger than the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from curvlin.numerics.kronecker import rotate
from curvlin.numerics.vanishing import vanishing


@dataclass(frozen=True)
class OffDiagonal:
    """What the rotated factors of one side hold beside their diagonals: S of them, those with a gradient.

    Attributes:
        matrices: ``(..., S, n, n)``, zero in value.
        weights: for each the diagonal on the other side of its term, ``(..., S, m)``.
        terms: for each the number of its term.
    """

    matrices: Tensor
    weights: Tensor
    terms: tuple[int, ...]


@dataclass(frozen=True)
class FrozenBasis:
    """``P^-1 = (X (x) Y) (D + E)^-1 (X (x) Y)^T``.

    Attributes:
        bases: X and Y, constants; None is the identity.
        d: the diagonal of D as ``(..., a, b)``, differentiable.
        off: E by sides; None where no factor of the side has a gradient.
    """

    bases: tuple[Tensor | None, Tensor | None]
    d: Tensor
    off: tuple[OffDiagonal | None, OffDiagonal | None] = (None, None)

    def seen_from(self, left: Tensor, right: Tensor) -> FrozenBasis:
        """``(left (x) right)^T P^-1 (left (x) right)``, the same inverse in other coordinates."""
        X, Y = (Q.mT if X is None else Q.mT @ X for X, Q in zip(self.bases, (left, right), strict=True))
        return replace(self, bases=(X, Y))

    @property
    def batch(self) -> torch.Size:
        """Batch dimensions of what comes out."""
        return torch.broadcast_shapes(self.d.shape[:-2], *(X.shape[:-2] for X in self.bases if X is not None))

    @property
    def moving(self) -> Iterator[tuple[int, OffDiagonal, Tensor]]:
        """The sides with a gradient, each with ``1 / d`` as ``(..., n, m)``, its own index first."""
        inverse = 1 / self.d
        for side, off in enumerate(self.off):
            if off is not None:
                yield side, off, inverse if side == 0 else inverse.mT

    def pieces(self, count: int, each: int) -> list[slice]:
        """`count` items of `each` elements, as many at a time as are about the size of the operator."""
        own = self.d.numel() + sum(off.matrices.numel() for off in self.off if off is not None)
        step = max(1, 2 * own // max(1, self.d.shape[:-2].numel() * each))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]


# -- the log-determinant -------------------------------------------------------------------------------------


def log_det(P: FrozenBasis) -> Tensor:
    """``log det P`` up to a constant."""
    total = P.d.log().sum((-2, -1))
    for _, off, inverse in P.moving:
        args = off.matrices, off.weights, inverse
        total = total + vanishing(_log_det_of_two_steps, 2, P.d.shape[:-2], args)
    return total


def _log_det_of_two_steps(L: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """``-sum_ikj K_ik K_ki / (d_ij d_kj) / 2`` with ``K = sum_t r_tj L_t``."""
    total = inverse.new_zeros(())
    for s in range(L.shape[-3]):
        for u in range(L.shape[-3]):
            both = (weights[..., s, :] * weights[..., u, :]).unsqueeze(-2)
            steps = (inverse * both) @ inverse.mT
            total = total - (L[..., s, :, :] * L[..., u, :, :].mT * steps).sum((-2, -1)) / 2
    return total


# -- the diagonal of the inverse -----------------------------------------------------------------------------


def inverse_diagonal(P: FrozenBasis) -> Tensor:
    """The diagonal of ``P^-1`` as ``(..., a, b)``."""
    squares = [None if X is None else X.square() for X in P.bases]
    total = _spread(squares[0], 1 / P.d, squares[1])
    for side, off, inverse in P.moving:
        change = _diagonals_of_changes(P, side, off, inverse)
        around = (None, change, squares[1]) if side == 0 else (squares[0], change.mT, None)
        total = total + _spread(*around)
    left, right = P.off
    if left is not None and right is not None:
        X, Y = P.bases
        assert X is not None and Y is not None
        inverse, size = 1 / P.d, max(P.d.shape[-2:])
        term = partial(_diagonal_of_a_step_each, _common(left, right))
        shape = (*P.batch, X.shape[-2], Y.shape[-2])
        for k in P.pieces(P.d.shape[-2], size * size):
            rows = left.matrices[..., k, :], left.weights, X[..., k], inverse[..., k, :]
            args = *rows, right.matrices, right.weights[..., k], X, Y, inverse
            total = total + vanishing(term, 2, shape, args)
    return total


def _spread(left: Tensor | None, values: Tensor, right: Tensor | None) -> Tensor:
    return rotate(left, values.unsqueeze(-3), right).squeeze(-3)


def _diagonals_of_changes(P: FrozenBasis, side: int, off: OffDiagonal, inverse: Tensor) -> Tensor:
    """For each element j of the other side, the diagonal of ``X (change of (D_j + K_j)^-1) X^T``: ``(..., n, m)``."""
    X, (n, m) = P.bases[side], inverse.shape[-2:]
    assert X is not None
    batch = torch.broadcast_shapes(P.d.shape[:-2], X.shape[:-2])
    total = X.new_zeros(())
    for order in (1, 2):
        parts = []
        for j in P.pieces(m, n * n):
            args = off.matrices, off.weights[..., j], inverse[..., j], X
            shape = (*batch, X.shape[-2], args[2].shape[-1])
            parts.append(vanishing(partial(_diagonal_of_change, order), order, shape, args))
        total = total + torch.cat(parts, -1)
    return total


def _diagonal_of_change(order: int, L: Tensor, weights: Tensor, inverse: Tensor, X: Tensor) -> Tensor:
    X = X.unsqueeze(-3)
    return (X @ _change(order, L, weights, inverse) * X).sum(-1).mT


def _change(order: int, L: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """The part of first or second order of ``(D_j + K_j)^-1``, with ``K_j = sum_t r_tj L_t``: ``(..., m, n, n)``."""
    K = torch.einsum("...sik,...sj->...jik", L, weights)
    rows, columns = inverse.mT.unsqueeze(-1), inverse.mT.unsqueeze(-2)
    return -rows * K * columns if order == 1 else rows * ((K * columns) @ K) * columns


def _diagonal_of_a_step_each(
    common: list[tuple[int, int]],
    L: Tensor,
    L_weights: Tensor,
    X_k: Tensor,
    inverse_k: Tensor,
    R: Tensor,
    R_weights: Tensor,
    X: Tensor,
    Y: Tensor,
    inverse: Tensor,
) -> Tensor:
    """A step on each side, in the order in which they meet in the elements (k, j) of some rows k.

    ``A_s[k]_pj = X_pk sum_i X_pi L_s,ki / d_ij`` and ``B_u[k]_qj = Y_qj sum_l Y_ql R_u,jl / d_kl``.
    """
    A = (X.unsqueeze(-3).unsqueeze(-4) * L.unsqueeze(-2)) @ inverse.unsqueeze(-3).unsqueeze(-4)
    A = A * X_k.mT.unsqueeze(-1).unsqueeze(-4)
    B = (Y.unsqueeze(-3) * inverse_k.unsqueeze(-2)).unsqueeze(-4) @ R.mT.unsqueeze(-3)
    B = B * Y.unsqueeze(-3).unsqueeze(-4)
    A_all = (A * L_weights[..., :, None, None, :]).sum(-4) * inverse_k.unsqueeze(-2)
    B_all = (B * R_weights[..., :, :, None, None]).sum(-4)
    total = 2 * (A_all @ B_all.mT).sum(-3)
    for s, u in common:
        total = total - (A[..., s, :, :, :] @ B[..., u, :, :, :].mT).sum(-3)
    return total


def _common(left: OffDiagonal, right: OffDiagonal) -> list[tuple[int, int]]:
    """Places of the terms that have both an L and an R."""
    return [(s, right.terms.index(t)) for s, t in enumerate(left.terms) if t in right.terms]


# -- traces --------------------------------------------------------------------------------------------------


def trace(P: FrozenBasis, terms: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]]) -> Tensor:
    """``tr(P^-1 Q)`` with ``Q = sum_u c_u M_u (x) N_u``.

    Args:
        P: the operator that is inverted.
        terms: c, M and N of each term of Q; None is one.
    """
    scales = [c for c, _, _ in terms]
    M, m = _rotated(P, 0, [M for _, M, _ in terms], scales)
    N, n = _rotated(P, 1, [N for _, _, N in terms], [None] * len(terms))
    inverse = 1 / P.d
    total = ((m @ inverse) * n).sum((-2, -1))
    batch = torch.broadcast_shapes(P.d.shape[:-2], m.shape[:-2], n.shape[:-2])
    for side, off, inverse in P.moving:
        Q, q = (M, n) if side == 0 else (N, m)
        assert Q is not None
        size, count = inverse.shape[-2:]
        args = off.matrices, off.weights, inverse, Q, q
        total = total + vanishing(_trace_of_one_step, 1, batch, args)
        for j in P.pieces(count, size * size):
            args = off.matrices, off.weights[..., j], inverse[..., j], Q, q[..., j]
            total = total + vanishing(_trace_of_two_steps, 2, batch, args)
    left, right = P.off
    if left is not None and right is not None:
        assert M is not None and N is not None
        term = partial(_trace_of_a_step_each, _common(left, right))
        factors = left.matrices, left.weights, right.matrices, right.weights
        total = total + vanishing(term, 2, batch, (*factors, 1 / P.d, M, N))
    return total


def _rotated(
    P: FrozenBasis, side: int, matrices: Sequence[Tensor | None], scales: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor]:
    """``c X^T M X`` of all terms, ``(..., U, n, n)``, and their diagonals; the whole matrix only where E meets it."""
    X, size, whole = P.bases[side], P.d.shape[side - 2], P.off[side] is not None
    rotated = []
    for M, c in zip(matrices, scales, strict=True):
        if X is None:
            ones = torch.ones(size, dtype=P.d.dtype, device=P.d.device)
            part = ones if M is None else M.diagonal(dim1=-2, dim2=-1)
        else:
            right = X if M is None else M @ X
            part = X.mT @ right if whole else (X * right).sum(-2)
        if c is not None:
            part = c[(..., *(None,) * (2 if whole else 1))] * part
        rotated.append(part)
    stack = stacked(rotated, 2 if whole else 1)
    return (stack, stack.diagonal(dim1=-2, dim2=-1)) if whole else (None, stack)


def stacked(tensors: Sequence[Tensor], own: int) -> Tensor:
    """The tensors, whose batches may differ, side by side left of their own dimensions."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(-1 - own)
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - own] for t in tensors))
    return torch.stack([t.expand(*batch, *t.shape[t.ndim - own :]) for t in tensors], -1 - own)


def _trace_of_one_step(L: Tensor, weights: Tensor, inverse: Tensor, Q: Tensor, q: Tensor) -> Tensor:
    """``-sum_ikj L_ik r_j Q_ki q_j / (d_ij d_kj)`` over the factors of E and of Q."""
    total = inverse.new_zeros(())
    for s in range(L.shape[-3]):
        for u in range(Q.shape[-3]):
            both = (weights[..., s, :] * q[..., u, :]).unsqueeze(-2)
            steps = (inverse * both) @ inverse.mT
            total = total - (L[..., s, :, :] * Q[..., u, :, :].mT * steps).sum((-2, -1))
    return total


def _trace_of_two_steps(L: Tensor, weights: Tensor, inverse: Tensor, Q: Tensor, q: Tensor) -> Tensor:
    change = _change(2, L, weights, inverse)
    return (change * torch.einsum("...uik,...uj->...jki", Q, q)).sum((-3, -2, -1))


def _trace_of_a_step_each(
    common: list[tuple[int, int]],
    L: Tensor,
    L_weights: Tensor,
    R: Tensor,
    R_weights: Tensor,
    inverse: Tensor,
    M: Tensor,
    N: Tensor,
) -> Tensor:
    """The steps meet in (k, j): ``A_s,kj = sum_i L_s,ki M_ik / d_ij``, ``B_u,kj = sum_l R_u,jl N_lj / d_kl``."""
    total = inverse.new_zeros(())
    weight, inverse = inverse, inverse.unsqueeze(-3)
    for u in range(M.shape[-3]):
        A = (L * M[..., u, None, :, :].mT) @ inverse
        B = inverse @ (R * N[..., u, None, :, :].mT).mT
        A_all = (A * L_weights.unsqueeze(-2)).sum(-3)
        B_all = (B * R_weights.unsqueeze(-1)).sum(-3)
        total = total + 2 * (weight * A_all * B_all).sum((-2, -1))
        for s, t in common:
            total = total - (A[..., s, :, :] * B[..., t, :, :]).sum((-2, -1))
    return total
