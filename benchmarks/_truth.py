"""The exact answers of a problem: its closed form in 50 digits, rounded once.

Kronecker terms go through the basis that diagonalises both of them, low rank through the k x k capacitance, blocks one
by one. Only the whitening that judges samples is float64, from the same bases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from _families import Problem

DIGITS = 50
Exact = Any  # an object array of mpmath numbers


@dataclass(frozen=True)
class Truth:
    """What every answer is compared with."""

    solve: Tensor
    inv_quad: float
    logdet: float
    inverse_diagonal: Tensor
    gradients: tuple[Tensor, ...]
    inverse_root: Tensor
    """F with ``F F^T = P^-1``, float64."""
    root: Tensor
    """``H = F^-T``, so that ``H H^T = P``."""

    def scaled(self, c: float) -> Truth:
        """The answers for ``c P``, but the gradients, which no scaling gives."""
        return Truth(
            self.solve / c,
            self.inv_quad / c,
            self.logdet + len(self.solve) * math.log(c),
            self.inverse_diagonal / c,
            (),
            self.inverse_root / c**0.5,
            self.root * c**0.5,
        )


def exact(t: Tensor) -> Exact:
    """The numbers of a tensor, without rounding."""
    return np.vectorize(mpmath.mpf, otypes=[object])(t.detach().double().numpy())


def rounded(x: Exact) -> Tensor:
    return torch.tensor(np.asarray(x, dtype=np.float64))


def total(x: Exact) -> Any:
    return mpmath.fsum(np.ravel(x).tolist())


_log = np.vectorize(mpmath.log, otypes=[object])


def _matrix(x: Exact) -> Any:
    return mpmath.matrix(x.tolist())


def _array(x: Any) -> Exact:
    return np.array(x.tolist(), dtype=object)


def cholesky(x: Exact) -> Exact:
    return _array(mpmath.cholesky(_matrix(x)))


def inverse(x: Exact) -> Exact:
    return _array(mpmath.inverse(_matrix(x)))


def logdet(lower: Exact) -> Any:
    return 2 * total(_log(lower.diagonal()))


# -- bases ---------------------------------------------------------------------------------------------------------


class DiagonalBase:
    """``Z = diag(d)``."""

    def __init__(self, d: Exact) -> None:
        self.d = d
        root = rounded(d).sqrt()
        self.roots = (1 / root).diag(), root.diag()
        self.logdet = total(_log(d))

    def solve(self, x: Exact) -> Exact:
        return (x.T / self.d).T

    def inverse_diagonal(self) -> Exact:
        return 1 / self.d

    def logdet_gradients(self) -> list[Exact]:
        return [1 / self.d]

    def outer_gradients(self, x: Exact) -> list[Exact]:
        """The gradient of ``x^T Z x``."""
        return [x * x]


class BlockBase:
    """``Z = blockdiag(B_1, ..., B_n)``."""

    def __init__(self, blocks: Exact) -> None:
        lowers = [cholesky(B) for B in blocks]
        self.inverses = [inverse(B) for B in blocks]
        self.logdet = total([logdet(L) for L in lowers])
        inverse_roots = (rounded(inverse(L)).mT for L in lowers)
        self.roots = torch.block_diag(*inverse_roots), torch.block_diag(*(rounded(L) for L in lowers))

    def solve(self, x: Exact) -> Exact:
        parts = np.split(x, len(self.inverses))
        return np.concatenate([M @ part for M, part in zip(self.inverses, parts, strict=True)])

    def inverse_diagonal(self) -> Exact:
        return np.concatenate([M.diagonal() for M in self.inverses])

    def logdet_gradients(self) -> list[Exact]:
        return [np.stack(self.inverses)]

    def outer_gradients(self, x: Exact) -> list[Exact]:
        return [np.stack([np.outer(part, part) for part in np.split(x, len(self.inverses))])]


class Pencil:
    """X with ``X^T M_t X = diag(values_t)`` for one or two matrices; orthogonal where there is one."""

    def __init__(self, matrices: list[Exact]) -> None:
        n = len(matrices[0])
        if len(matrices) == 1:
            _, Q = mpmath.eigsy(_matrix(matrices[0]))
            self.X = self.dual = _array(Q)
            self.logdet = mpmath.mpf(0)
        else:
            S = sum(M / M.trace() for M in matrices)
            L = cholesky(S)
            back = inverse(L)
            _, Q = mpmath.eigsy(_matrix(back @ (matrices[0] / matrices[0].trace()) @ back.T))
            self.X, self.dual = back.T @ _array(Q), L @ _array(Q)  # dual = X^-T
            self.logdet = logdet(L)  # of S = X^-T X^-1
        self.values = [np.array([self.X[:, i] @ M @ self.X[:, i] for i in range(n)]) for M in matrices]


class KroneckerBase:
    """``Z = sum_t A_t (x) B_t + shift I``."""

    def __init__(self, terms: list[tuple[Exact, Exact]], shift: Any) -> None:
        self.terms, self.shift = terms, shift
        self.left, self.right = (Pencil([pair[side] for pair in terms]) for side in (0, 1))
        self.sizes = len(self.left.X), len(self.right.X)
        self.eigenvalues = sum(
            np.outer(a, b) for a, b in zip(self.left.values, self.right.values, strict=True)
        )
        if shift is not None:
            self.eigenvalues = self.eigenvalues + shift
        a, b = self.sizes
        self.logdet = total(_log(self.eigenvalues)) + b * self.left.logdet + a * self.right.logdet
        root = rounded(self.eigenvalues).flatten().sqrt()
        X, Y = rounded(self.left.X), rounded(self.right.X)
        dual = torch.kron(rounded(self.left.dual), rounded(self.right.dual))
        self.roots = torch.kron(X, Y) / root, dual * root

    def solve(self, x: Exact) -> Exact:
        if x.ndim == 2:
            return np.stack([self.solve(column) for column in x.T], axis=1)
        X, Y = self.left.X, self.right.X
        return (X @ ((X.T @ x.reshape(self.sizes) @ Y) / self.eigenvalues) @ Y.T).ravel()

    def inverse_diagonal(self) -> Exact:
        return ((self.left.X**2) @ (1 / self.eigenvalues) @ (self.right.X**2).T).ravel()

    def logdet_gradients(self) -> list[Exact]:
        X, Y, d = self.left.X, self.right.X, self.eigenvalues
        gradients = []
        for a, b in zip(self.left.values, self.right.values, strict=True):
            gradients += [(X * (1 / d @ b)) @ X.T, (Y * (a @ (1 / d))) @ Y.T]
        return gradients if self.shift is None else [*gradients, total(1 / d)]

    def outer_gradients(self, x: Exact) -> list[Exact]:
        V = x.reshape(self.sizes)
        gradients = []
        for A, B in self.terms:
            gradients += [V @ B @ V.T, V.T @ A @ V]
        return gradients if self.shift is None else [*gradients, x @ x]


def base_of(problem: Problem) -> DiagonalBase | BlockBase | KroneckerBase:
    c = mpmath.mpf(problem.factor)
    if problem.d is not None:
        return DiagonalBase(exact(problem.d))
    if problem.blocks is not None:
        return BlockBase(exact(problem.blocks))
    terms = [(c * exact(A), exact(B)) for A, B in problem.terms]
    return KroneckerBase(terms, None if problem.shift is None else c * exact(problem.shift).item())


# -- the whole -----------------------------------------------------------------------------------------------------


def truth(problem: Problem) -> Truth:
    """The answers for ``P = Z + U U^T``.

    Gradients are those of ``b^T P^-1 b + log det P``, that is ``tr((P^-1 - x x^T) dP)`` with ``x = P^-1 b``.
    """
    with mpmath.workdps(DIGITS):
        Z, b = base_of(problem), exact(problem.b)
        x, log_det, variances = Z.solve(b), Z.logdet, Z.inverse_diagonal()
        gradients = Z.logdet_gradients()
        U, W = None, []
        if problem.U is not None:
            U = exact(problem.U)
            V = Z.solve(U)
            L = cholesky(np.eye(U.shape[1], dtype=object) * mpmath.mpf(1) + U.T @ V)
            W = list((V @ inverse(L).T).T)  # P^-1 = Z^-1 - W W^T
            x = x - sum(w * (w @ b) for w in W)
            log_det = log_det + logdet(L)
            variances = variances - sum(w * w for w in W)
        for w in (*W, x):
            gradients = [g - h for g, h in zip(gradients, Z.outer_gradients(w), strict=True)]
        for i in range(0, 2 * len(problem.terms), 2):
            gradients[i] = problem.factor * gradients[i]  # Z has factor * A
        if problem.shift is not None:
            gradients[2 * len(problem.terms)] = problem.factor * gradients[2 * len(problem.terms)]
        if U is not None:
            inverse_U = V - sum(np.outer(w, w @ U) for w in W)
            gradients.append(2 * (inverse_U - np.outer(x, x @ U)))
        F, H = Z.roots
        if problem.U is not None:
            Q, s, _ = torch.linalg.svd(F.mT @ problem.U.double(), full_matrices=False)
            h = (1 + s.square()).sqrt()
            F, H = F + ((F @ Q) * (1 / h - 1)) @ Q.mT, H + ((H @ Q) * (h - 1)) @ Q.mT
        return Truth(
            rounded(x),
            float(b @ x),
            float(log_det),
            rounded(variances),
            tuple(rounded(g) for g in gradients),
            F,
            H,
        )
