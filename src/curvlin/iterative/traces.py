"""Traces and diagonals from products with a few random vectors, each with its standard error.

`A` is a function ``(D, K) -> (D, K)``. With m products: Hutchinson's error falls as ``|A|_F / sqrt(m)``; Hutch++ and
XTrace first take out what a sketch of the range explains, and their errors fall as ``1 / m`` and faster where the
spectrum decays. XTrace uses every vector for both purposes, so it is the default.

    Hutchinson 1990; Meyer, Musco, Musco & Woodruff, "Hutch++", SOSA 2021;
    Epperly, Tropp & Webber, "XTrace: making the most of every sample", SIMAX 45 (2024): XTrace and XDiag.

The k estimates X_j of XTrace and XDiag, vector j against the sketch by the others, share their sketches, and the spread
over j alone is too small a standard error for their mean. Given all other vectors X_j has mean tr A, hence

    Var(mean X) = E[var X] / k + mean_{i != j} E[d_ij d_ji],    d_ij = X_j - X_j without vector i in its sketch

(in the covariance of X_i and X_j, every part of X_j that does not depend on vector i drops out). Both terms are
estimated without bias from what has been computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin._random import random_signs, standard_normal
from curvlin.index import identity_columns
from curvlin.iterative.krylov import LinearMap, dot
from curvlin.iterative.results import Estimate, estimate, exactly

Generator = torch.Generator | None


def hutchinson(A: LinearMap, size: int, products: int, generator: Generator, like: Tensor) -> Estimate:
    """``tr A``, the mean of ``z^T A z`` over random signs z."""
    Z = random_signs((size, products), generator, like)
    return estimate(dot(Z, A(Z)), products)


def hutch_plus_plus(A: LinearMap, size: int, products: int, generator: Generator, like: Tensor) -> Estimate:
    """``tr(Q^T A Q)`` on a sketched range, and Hutchinson's estimate of the rest; a third of the products each."""
    k = products // 3
    Q: Tensor = torch.linalg.qr(A(random_signs((size, k), generator, like))).Q
    known = dot(Q, A(Q)).sum()
    rest = _deflated(A, Q, random_signs((size, products - 2 * k), generator, like))
    return estimate(dot(*rest), products).plus(known)


def xtrace(A: LinearMap, size: int, products: int, generator: Generator, like: Tensor) -> Estimate:
    """``X_j = tr(Q_j^T A Q_j) + u^T A u``, with Q_j the sketch by the others and ``u = (I - Q_j Q_j^T) omega_j``."""
    k = products // 2
    Omega = standard_normal((size, k), torch.Size(), generator, like)
    Y, Q, R, Z = _sketch(A, Omega)
    H, W = (Q.mT @ Z).double(), (Q.mT @ Omega).double()
    if (left_out := _LeftOut.of(R)) is None:
        rest = _deflated(A, Q, random_signs((size, k), generator, like))
        return estimate(dot(*rest), 3 * k).plus(H.trace())
    S = left_out.S
    kept = (W - S * (S * W).sum(0)).to(like.dtype)
    U, AU = Omega - Q @ kept, Y - Z @ kept
    # The direction of u is uniform in its space; its length is known on average, so it is not left to chance.
    forms, lengths = dot(U, AU), dot(U, U)
    known = H.trace() - (S * (H @ S)).sum(0)
    X = known + forms * (size - k + 1) / lengths
    # Without vector i, Q_j loses one more direction t, and u gains (t . w) t.
    t_w, t_H_t = left_out.along(W), left_out.form(H)
    forms = forms + t_w * left_out.along((Q.mT @ AU + Z.mT @ U).double()) + t_w.square() * t_H_t
    X_without = known - t_H_t + forms * (size - k + 2) / (lengths + t_w.square())
    d = X - X_without
    return _mean(X, (d * d.mT).sum() - d.diagonal().square().sum(), 2 * k)


def xdiag(A: LinearMap, size: int, products: int, generator: Generator, like: Tensor) -> Estimate:
    """``X_j = diag(Q_j Q_j^T A) + omega_j * (I - Q_j Q_j^T) A omega_j`` for a symmetric A, entry by entry."""
    k = products // 2
    Omega = random_signs((size, k), generator, like)
    _, Q, R, Z = _sketch(A, Omega)
    known = (Q * Z).sum(-1, dtype=torch.float64)
    if (left_out := _LeftOut.of(R)) is None:
        signs = random_signs((size, k), generator, like)
        image = A(signs)
        return estimate((signs * (image - Q @ (Q.mT @ image))).double(), 3 * k).plus(known)
    S, rho, g = left_out.S, left_out.rho, left_out.g
    a, b = (Q @ S.to(like.dtype)).double(), (Z @ S.to(like.dtype)).double()
    c = Omega * (S * R.double()).sum(0)
    X = known[:, None] - a * b + a * c
    shared = torch.zeros_like(known)
    for i in range(k):  # d_ij and d_ji for all j at once
        r = rho[i]
        d_ij = (a[:, i : i + 1] - r * a) * (b[:, i : i + 1] - r * b + r * c)
        d_ji = (a - r * a[:, i : i + 1]) * (b - r * b[:, i : i + 1] + r * c[:, i : i + 1])
        shared += (d_ij * d_ji) @ g[i].square()
    return _mean(X, shared, 2 * k)


def exact_diagonal(A: LinearMap, size: int, like: Tensor) -> Estimate:
    """The diagonal, from as many products as there are rows, some columns at a time."""
    parts = torch.arange(size, device=like.device).split(max(1, 2**22 // size))
    diagonal = []
    for rows in parts:
        image = A(identity_columns(rows, size, like.dtype))
        diagonal.append(image[rows, torch.arange(len(rows), device=like.device)].double())
    return exactly(torch.cat(diagonal), size)


TRACES: dict[str, Callable[..., Estimate]] = {
    "xtrace": xtrace,
    "hutch++": hutch_plus_plus,
    "hutchinson": hutchinson,
}
LEAST = {"xtrace": 8, "hutch++": 12, "hutchinson": 4, "xdiag": 8}
"""The fewest products: four samples of random signs are seldom equal by chance."""


def _deflated(A: LinearMap, Q: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """``(I - Q Q^T) Z`` and its image."""
    Z = Z - Q @ (Q.mT @ Z)
    return Z, A(Z)


def _sketch(A: LinearMap, Omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Y = A Omega = Q R`` and ``Z = A Q``."""
    Y = A(Omega)
    Q, R = torch.linalg.qr(Y)
    return Y, Q, R, A(Q)


@dataclass(frozen=True)
class _LeftOut:
    """What the range Q of a sketch loses without some of its vectors, in coordinates of Q.

    Without vector j it loses the unit vector s_j, which is orthogonal to every column of R but the j-th, hence along
    ``R^-T e_j``; without i too, ``t_ij = (s_i - rho_ij s_j) sqrt(g_ij)`` with ``rho = S^T S``, ``g = 1 / (1 -
    rho^2)`` (zero for i = j).
    """

    S: Tensor
    rho: Tensor
    g: Tensor

    @classmethod
    def of(cls, R: Tensor) -> _LeftOut | None:
        """None if R is singular to rounding: a vector is then dependent on the others, or beneath their noise."""
        pivots = R.diagonal().abs()
        if bool(pivots.min() <= len(R) * torch.finfo(R.dtype).eps * pivots.max()):
            return None
        S = torch.linalg.inv(R.double()).mT
        S = S / torch.linalg.vector_norm(S, dim=0)
        rho = S.mT @ S
        g = 1 / (1 - rho.square()).fill_diagonal_(1.0)
        return cls(S, rho, g.fill_diagonal_(0.0))

    def along(self, X: Tensor) -> Tensor:
        """``t_ij . x_j``."""
        SX = self.S.mT @ X
        return self.g.sqrt() * (SX - self.rho * SX.diagonal())

    def form(self, H: Tensor) -> Tensor:
        """``t_ij^T H t_ij``."""
        F = self.S.mT @ H @ self.S
        own = F.diagonal()
        return self.g * (own[:, None] - self.rho * (F + F.mT) + self.rho.square() * own)


def _mean(X: Tensor, shared: Tensor, products: int) -> Estimate:
    """The mean over the last dimension, whose variance has a `shared` part: the sum over i != j of d_ij d_ji."""
    k = X.shape[-1]
    variance = X.var(-1) / k + (shared / (k * (k - 1))).clamp(min=0.0)
    return Estimate(X.mean(-1), variance.sqrt(), k - 1, products)
