"""Matrices of `linear_operator` whose structure is one of ours, as ours.

    theirs                                               ours
    Identity, ConstantDiag                               Isotropic
    Diag, KroneckerProductDiag                           Diagonal
    Dense, Chol, a tensor, an evaluated kernel           Dense
    KroneckerProduct of two factors                      KroneckerSum (identities kept)
    BlockDiag, BlockInterleaved                          BlockDiag
    ConstantMul, BatchRepeat                             of what is inside
    Sum, AddedDiag, PsdSum, SumKronecker,                the sum of the parts, in any order;
      KroneckerProductAddedDiag, LowRankRootAddedDiag    Root and LowRankRoot in it are low-rank updates
    an adapter of ours                                   what it was made from

A class is taken by its exact type, so that a subclass with another meaning is refused rather than misread.
"""

from __future__ import annotations

import functools
import operator as op
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
from linear_operator import operators as theirs
from linear_operator.operators import LinearOperator
from torch import Tensor

from curvlin._tree import is_concrete
from curvlin.covariance import Covariance
from curvlin.errors import NotClosedError
from curvlin.interop.linear_operator import CurvlinLinearOperator
from curvlin.interop.root_factor import RootFactor
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum

Matrix: TypeAlias = "LinearOperator | Tensor"


@overload
def from_linear_operator(matrix: Matrix, as_: Literal["precision"]) -> PrecisionOperator: ...
@overload
def from_linear_operator(matrix: Matrix, as_: Literal["covariance"]) -> Covariance: ...
def from_linear_operator(
    matrix: Matrix, as_: Literal["precision", "covariance"]
) -> PrecisionOperator | Covariance:
    """A matrix of `linear_operator` as an operator of ours, sharing its tensors; gradients flow to them.

    Args:
        matrix: a `LinearOperator` (or a tensor), batched or not.
        as_: what the matrix is. As a "precision" the result is a `PrecisionOperator`, as a "covariance" a
            `Covariance`.

    Raises:
        NotClosedError: if its structure is none of ours.
        ValueError: if `as_` is neither.
    """
    if as_ not in ("precision", "covariance"):
        raise ValueError(f'as_ must be "precision" or "covariance", found {as_!r}')
    if isinstance(matrix, CurvlinLinearOperator):
        C = matrix._whole()
        return C if as_ == "covariance" else C._entries()
    found = entries(matrix)
    return found if as_ == "precision" else Covariance.of(found)


def entries(matrix: Matrix) -> PrecisionOperator:
    """The operator of ours with the entries of `matrix`."""
    if isinstance(matrix, CurvlinLinearOperator):
        return matrix._whole()._entries()
    if isinstance(matrix, Tensor):
        return Dense(matrix)
    rule = _RULES.get(type(matrix))
    if rule is None and type(matrix).evaluate_kernel is not LinearOperator.evaluate_kernel:
        evaluated = matrix.evaluate_kernel()
        if evaluated is not matrix:
            return entries(evaluated)  # a kernel that gpytorch had not evaluated yet
    if rule is None:
        raise NotClosedError(
            f"no operator of ours has the structure of a {type(matrix).__name__}; supported are "
            f"{', '.join(sorted(cls.__name__ for cls in _RULES))}, sums and positive multiples of them; pass "
            "its to_dense() if D^2 entries are affordable"
        )
    return rule(matrix)


def operator_of_sum(parts: list[Any]) -> PrecisionOperator:
    """The sum of the parts; roots of low rank become updates of the rest."""
    terms: list[PrecisionOperator] = []
    roots: list[Tensor] = []
    for part, scale in (pair for p in parts for pair in _flat(p, None)):
        if type(part) in _ROOTS and not isinstance(part.root, RootFactor):
            if scale is not None and is_concrete(scale) and bool((scale < 0).any()):
                raise NotClosedError(
                    f"a sum must have no negative multiple of a {type(part).__name__}, found "
                    f"{float(scale.detach().min()):.3e}; subtract with P.downdate(U), which says whether the result "
                    "is definite"
                )
            U = part.root.to_dense()
            roots.append(U if scale is None else U * scale.sqrt()[..., None, None])
        elif type(part) is not theirs.ZeroLinearOperator:
            term = entries(part)
            terms.append(term if scale is None else term * scale)
    if not terms:
        raise NotClosedError(
            "a root of low rank alone is singular and no operator of ours; add a diagonal to it first"
        )
    # Simple terms first: what is added to a multiple of the identity is closed most often.
    terms.sort(key=lambda term: _ORDER.index(type(term)) if type(term) in _ORDER else len(_ORDER))
    total = functools.reduce(op.add, terms)
    for U in roots:
        total = total.update(U)
    return total


_ROOTS = (theirs.LowRankRootLinearOperator, theirs.RootLinearOperator)
_ORDER = [Isotropic, Diagonal, KroneckerSum, BlockDiag]


def _flat(part: Any, scale: Tensor | None) -> list[tuple[Any, Tensor | None]]:
    """Sums of sums and multiples of them, as one list of parts with their scales."""
    if type(part) in _SUMS:
        return [pair for inner in part.linear_ops for pair in _flat(inner, scale)]
    if type(part) is theirs.ConstantMulLinearOperator:
        constant = part._constant
        constant = constant.squeeze(-1) if constant.shape == (1,) else constant
        return _flat(part.base_linear_op, constant if scale is None else scale * constant)
    return [(part, scale)]


def _sum(matrix: Any) -> PrecisionOperator:
    return operator_of_sum([matrix])


def _root(matrix: Any) -> PrecisionOperator:
    if isinstance(matrix.root, RootFactor):
        return matrix.root.squared()._entries()
    return operator_of_sum([matrix])


def _isotropic(matrix: Any) -> Isotropic:
    return Isotropic(matrix.diag_values.squeeze(-1), matrix.diag_shape)


def _diagonal(matrix: Any) -> Diagonal:
    return Diagonal(matrix._diagonal())


def _dense(matrix: Any) -> Dense:
    return Dense(matrix.tensor)


def _cholesky(matrix: Any) -> Dense:
    L = matrix.root.to_dense()
    return Dense(L.mT @ L if matrix.upper else L @ L.mT)


def _kronecker(matrix: Any) -> KroneckerSum:
    if len(matrix.linear_ops) != 2:
        raise NotClosedError(
            f"a Kronecker product of ours has two factors, found {len(matrix.linear_ops)}; multiply some out "
            "until two are left"
        )
    left, right = (factor.shape[-1] for factor in matrix.linear_ops)
    factors = [
        None if type(factor) is theirs.IdentityLinearOperator else entries(factor).to_dense()
        for factor in matrix.linear_ops
    ]
    if all(factor is None for factor in factors):
        raise NotClosedError("a Kronecker product of two identities has no matrix; use an identity")
    return KroneckerSum([(factors[0], factors[1])], sizes=(left, right))


def _block_diag(matrix: Any) -> BlockDiag:
    return BlockDiag(_blocks(matrix))


def _block_interleaved(matrix: Any) -> BlockDiag:
    blocks = _blocks(matrix)
    size = matrix.shape[-1]
    return BlockDiag(blocks, [torch.arange(i, size, len(blocks)) for i in range(len(blocks))])


def _blocks(matrix: Any) -> list[PrecisionOperator]:
    """The last batch dimension of what is inside, taken apart."""
    stacked = entries(matrix.base_linear_op)
    stacked = stacked.expand(stacked.batch_shape)

    def block(i: int) -> PrecisionOperator:
        return stacked._map(lambda t, own: t.select(t.ndim - own - 1, i))

    return [block(i) for i in range(stacked.batch_shape[-1])]


def _batch_repeat(matrix: Any) -> PrecisionOperator:
    inside = entries(matrix.base_linear_op)
    counts = matrix.batch_repeat
    inside = inside.expand((1,) * (len(counts) - len(inside.batch_shape)) + tuple(inside.batch_shape))
    return inside._map(lambda t, own: t.repeat(*counts, *(1,) * own))


_SUMS = (
    theirs.SumLinearOperator,
    theirs.AddedDiagLinearOperator,
    theirs.PsdSumLinearOperator,
    theirs.SumKroneckerLinearOperator,
    theirs.KroneckerProductAddedDiagLinearOperator,
    theirs.LowRankRootAddedDiagLinearOperator,
)

_RULES: dict[type, Callable[[Any], PrecisionOperator]] = {
    theirs.IdentityLinearOperator: _isotropic,
    theirs.ConstantDiagLinearOperator: _isotropic,
    theirs.DiagLinearOperator: _diagonal,
    theirs.KroneckerProductDiagLinearOperator: _diagonal,
    theirs.DenseLinearOperator: _dense,
    theirs.CholLinearOperator: _cholesky,
    theirs.KroneckerProductLinearOperator: _kronecker,
    theirs.BlockDiagLinearOperator: _block_diag,
    theirs.BlockInterleavedLinearOperator: _block_interleaved,
    theirs.BatchRepeatLinearOperator: _batch_repeat,
    theirs.ConstantMulLinearOperator: _sum,
    theirs.LowRankRootLinearOperator: _root,
    theirs.RootLinearOperator: _root,
    **dict.fromkeys(_SUMS, _sum),
}
