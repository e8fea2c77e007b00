"""The table of inverses that are operators of their own: what `Covariance` needs where entries of C are added up.

    P                                P^-1
    Isotropic, Diagonal, Dense       the same
    BlockDiag                        block by block
    A (x) B                          A^-1 (x) B^-1
    other Kronecker, one basis       SpectralKronecker, if no derivative flows into the factors
    Z + s U U^T                      Z^-1 - s V V^T, V = Z^-1 U (I + s U^T Z^-1 U)^{-1/2}
    Z + U U^T, as many columns as D  Dense

Solves, determinants and samples of a covariance need none of this: they are those of P, read the other way.

``Z^-1 - V V^T`` as a matrix of its own forgets what V V^T takes from Z^-1 to rounding: with sigma^2 the largest gain
(eigenvalue of ``U^T Z^-1 U``), its small eigenvalues, its determinant, its solves and its derivatives by U are good to
sigma^2 eps. Where the columns of U may reach all D directions, all of it is small; a matrix takes no more memory than U
there, and keeps its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin._tables import INVERSE, register_inverse
from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum, spectral_form
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.low_rank_roots import inverse_columns
from curvlin.precision.spectral import SpectralKronecker


def inverse_operator(P: PrecisionOperator) -> PrecisionOperator:
    """The operator whose entries are those of ``P^-1``.

    Raises:
        NotClosedError: if the inverse has no structure of ours.
        NotPositiveDefiniteError: if P is singular.
    """
    for base in type(P).__mro__:
        if (rule := INVERSE.get(base)) is not None:
            result: PrecisionOperator = rule(P)
            return result
    raise _refused(P, "its inverse has no structure of ours")


def _refused(P: PrecisionOperator, why: str) -> NotClosedError:
    return NotClosedError(
        f"the inverse of this {type(P).__name__} is no operator of its own: {why}; keep it as P.inverse(), or use "
        "Dense(P.inverse().to_dense()) if D^2 entries are affordable"
    )


@register_inverse(Isotropic)
def _isotropic(P: Isotropic) -> Isotropic:
    P._factored()  # which refuses what is not positive
    return P._with(value=1 / P.value)


@register_inverse(Diagonal)
def _diagonal(P: Diagonal) -> Diagonal:
    return Diagonal(P.inverse_diagonal())


@register_inverse(Dense)
def _dense(P: Dense) -> Dense:
    return Dense(_inverse_matrix(P.matrix))


@register_inverse(BlockDiag)
def _block_diag(P: BlockDiag) -> BlockDiag:
    return P.with_blocks([inverse_operator(block) for block in P.blocks])


@register_inverse(SpectralKronecker)
def _spectral(P: SpectralKronecker) -> SpectralKronecker:
    P._factored()
    return P.with_eigenvalues(1 / P.eigenvalues)


@register_inverse(KroneckerSum)
def _kronecker(P: KroneckerSum) -> KroneckerSum | SpectralKronecker:
    if len(P.terms) == 1 and P.shift is None:
        left, right = (None if M is None else _inverse_matrix(M) for M in P.terms[0])
        return KroneckerSum([(left, right)], sizes=P.sizes)
    if not P.orthogonal:
        raise _refused(P, "the basis of two general terms is not orthogonal")
    if P._factors_need_grad():
        raise _refused(P, "derivatives flow into its factors, and an eigenbasis is a constant")
    Q, factors = P._factored()
    X, Y, d = spectral_form(Q, factors)
    eyes = [torch.eye(n, dtype=torch.float64, device=P.device) for n in P.sizes]
    bases = [eye if basis is None else basis for basis, eye in zip((X, Y), eyes, strict=True)]
    batch = torch.broadcast_shapes(d.shape[:-2], *(basis.shape[:-2] for basis in bases))
    return SpectralKronecker(bases[0], bases[1], (1 / d).expand(*batch, *P.sizes)).to(P.dtype)


@register_inverse(Woodbury)
def _woodbury(P: Woodbury) -> Woodbury | Dense:
    if P.core is not None or not isinstance(P.U, Tensor):
        raise _refused(P, "it has a core, or features in the place of U")
    if P.sign > 0 and P.rank >= P.size:
        # No direction is left in which Z^-1 is larger than what V V^T takes from it.
        return Dense(_symmetric(P.solve(_eye(P))))
    base = inverse_operator(P.base if P.weight is None else P.base / P.weight)
    working, factors = P._factored()
    columns = inverse_columns(working._unweighted(), factors).to(P.dtype)
    changed = Woodbury(base, columns)._with(sign=-P.sign)
    result: Woodbury = changed if P.weight is None else changed / P.weight
    return result


def _inverse_matrix(M: Tensor) -> Tensor:
    P = Dense(M)
    return _symmetric(P.solve(_eye(P).expand(M.shape)))


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2


def _eye(P: PrecisionOperator) -> Tensor:
    return torch.eye(P.size, dtype=P.dtype, device=P.device)
