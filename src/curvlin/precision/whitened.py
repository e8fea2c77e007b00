"""The root of a Kronecker sum: ``(L_l (x) L_r) K^{1/2}`` where ``P = (L_l (x) L_r) K (L_l (x) L_r)^T``.

L whitens a side that holds two matrices and is absent elsewhere, and K is diagonal in an orthogonal basis. Its root is
the symmetric one: it varies smoothly where eigenvectors do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin._tree import is_concrete
from curvlin.numerics.cholesky import follow
from curvlin.numerics.inverse_root import inverse_root, inverse_square_root_rule
from curvlin.numerics.kronecker import congruence, rotate
from curvlin.numerics.pencil import Side
from curvlin.precision.kronecker import KroneckerFactors, KroneckerSum, Pair

_NODES_AT_A_TIME = 4
_NODES_FOR_ANY_CONDITION = 72  # what a condition number of 1e14 needs


def whitened(P: KroneckerSum, factors: KroneckerFactors) -> WhitenedFrame:
    """The parts of the root of P."""
    sides = tuple(Side(side.spectra, side.orthogonal, None, side.orthogonal) for side in factors.sides)
    inner_factors = KroneckerFactors(sides[0], sides[1], factors.eigenvalues)
    lowers = [side.lower for side in factors.sides]
    if not P._needs_grad():
        return WhitenedFrame((lowers[0], lowers[1]), None, inner_factors)
    matrices = [P._side(0), P._side(1)]
    for s, lower in enumerate(lowers):
        if lower is not None:
            lower = lowers[s] = _differentiable_lower(lower, matrices[s])
            matrices[s] = [_solve_both_sides(lower, M) for M in matrices[s]]
    inner = P._with(CommutingSum, terms=tuple(zip(*matrices, strict=True)), roots=None)
    return WhitenedFrame((lowers[0], lowers[1]), inner, inner_factors)


@dataclass(frozen=True)
class WhitenedFrame:
    """The L of each side, K where derivatives are asked for, and the factors of K."""

    lowers: Pair
    inner: CommutingSum | None
    factors: KroneckerFactors

    def whiten(self, X: Tensor) -> Tensor:
        """``R^T X``."""
        return self._root(congruence(self.lowers[0], self._grid(X), self.lowers[1]).flatten(-2).mT)

    def unwhiten(self, Z: Tensor) -> Tensor:
        """``R^-T Z``."""
        return self._solve_lower(self._inverse_root(Z), transpose=True)

    def root_matvec(self, Z: Tensor) -> Tensor:
        """``R Z``."""
        return rotate(self.lowers[0], self._grid(self._root(Z)), self.lowers[1]).flatten(-2).mT

    def root_solve(self, G: Tensor) -> Tensor:
        """``R^-1 G``."""
        return self._inverse_root(self._solve_lower(G, transpose=False))

    def _grid(self, X: Tensor) -> Tensor:
        return X.mT.unflatten(-1, self.factors.eigenvalues.shape[-2:])

    def _solve_lower(self, X: Tensor, *, transpose: bool) -> Tensor:
        V = self._grid(X)
        left, right = self.lowers
        if left is not None:
            M = (left.mT if transpose else left).unsqueeze(-3)
            V = torch.linalg.solve_triangular(M, V, upper=transpose)
        if right is not None:
            M = (right.mT if transpose else right).unsqueeze(-3)
            V = torch.linalg.solve_triangular(M, V.mT, upper=transpose).mT
        return V.flatten(-2).mT

    def _inverse_root(self, Z: Tensor) -> Tensor:
        """``K^{-1/2} Z``."""
        if self.inner is None:
            return self.factors.function(1 / self.factors.eigenvalues.sqrt(), Z)
        return inverse_root(self.inner, Z, self.factors)

    def _root(self, Z: Tensor) -> Tensor:
        """``K^{1/2} Z``."""
        if self.inner is None:
            return self.factors.function(self.factors.eigenvalues.sqrt(), Z)
        return self.inner._matmul(self._inverse_root(Z))


class CommutingSum(KroneckerSum):
    """A Kronecker sum whose factors share an orthogonal eigenbasis on each side, by construction."""

    @property
    def orthogonal(self) -> bool:
        return True

    def _factorize(self) -> KroneckerFactors:
        sides = []
        for s in (0, 1):
            matrices = self._side(s)
            first = next((M for M in matrices if M is not None), None)
            if first is None:
                sides.append(Side((self._ones(s),) * len(matrices), None, None, None))
                continue
            spectrum, Q = torch.linalg.eigh(first)
            spectra = [
                torch.ones_like(spectrum) if M is None else ((M @ Q) * Q).sum(-2).clamp(min=0.0)
                for M in matrices
            ]
            sides.append(Side(tuple(spectra), Q, None, Q))
        return KroneckerFactors(sides[0], sides[1], self._combine(sides[0].spectra, sides[1].spectra))

    def _inverse_root_value(self, Z: Tensor, factors: KroneckerFactors) -> Tensor:
        return factors.function(1 / factors.eigenvalues.sqrt(), Z)

    def _quadrature(
        self, factors: KroneckerFactors, batch_ndim: int
    ) -> Iterator[tuple[CommutingSum, KroneckerFactors, Tensor]]:
        """``K + t_q I`` with its factors and the weight w_q, a few nodes at a time as a leading dimension.

        That stands left of the batch of K and of the `batch_ndim` dimensions of what K meets.
        """
        d = factors.eigenvalues
        n = None if is_concrete(d) else _NODES_FOR_ANY_CONDITION
        between = (1,) * (max(batch_ndim, len(self.batch_shape)) - (d.ndim - 2))
        nodes_and_weights = (
            part.reshape(part.shape[0], *between, *part.shape[1:]).split(_NODES_AT_A_TIME)
            for part in inverse_square_root_rule(d.amin((-2, -1)), d.amax((-2, -1)), n)
        )
        for nodes, weights in zip(*nodes_and_weights, strict=True):
            shifted = self._with(shift=nodes if self.shift is None else self.shift + nodes)
            moved = KroneckerFactors(factors.left, factors.right, d + nodes[..., None, None])
            yield shifted, moved, weights[..., None, None]


def _solve_both_sides(lower: Tensor, M: Tensor | None) -> Tensor:
    """``L^-1 M L^-T``."""
    assert M is not None  # a whitened side holds two matrices and no identity
    half = torch.linalg.solve_triangular(lower, M, upper=False)
    return torch.linalg.solve_triangular(lower, half.mT, upper=False)


def _differentiable_lower(lower: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """The accurate L of the factorisation with the derivatives of chol(M1 / tr M1 + M2 / tr M2)."""
    total: Tensor | float = 0.0
    for M in matrices:
        assert M is not None
        trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        total = total + M / trace
    assert isinstance(total, Tensor)
    return follow(lower, total)
