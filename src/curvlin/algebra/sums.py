"""The table of sums ``P + Q``. Looked up in both orders, so each pair is entered once.

    +               Isotropic   Diagonal    Kronecker        BlockDiag         Woodbury (LowRankPlusDiag)
    Isotropic       Isotropic   Diagonal    shifted          block by block    base + Q
    Diagonal                    Diagonal    -                block by block    base + Q
    KroneckerSum                            one or two terms -                 base + Q
    BlockDiag                                                nested partitions base + Q
    Woodbury                                                                   bases, then both updates

    Dense + anything is Dense. SpectralKronecker + Isotropic, or + one in the same basis, is SpectralKronecker.

Closure depends on types and static structure (number of terms, identity factors, index sets); the one exception is
"the same basis", which compares two tensors that no gradient flows into (and under a transform asks whether they are
one). A rule returns None where it does not apply; so does "base + Q" where features that change the base have no
congruence with the sum.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from curvlin._tables import ADD, register
from curvlin._tree import is_concrete
from curvlin.algebra.congruence import contracts
from curvlin.index import IndexSet
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum, Pair
from curvlin.precision.low_rank import LowRankPlusDiag, Woodbury
from curvlin.precision.spectral import SpectralKronecker
from curvlin.precision.update import joined_columns, unit_weight

# -- diagonals and dense matrices ------------------------------------------------------------------------------


@register(ADD, Isotropic, Isotropic)
def isotropic_isotropic(P: Isotropic, Q: Isotropic) -> Isotropic:
    return Isotropic(P.value + Q.value, P.size)


@register(ADD, Diagonal, Diagonal)
@register(ADD, Diagonal, Isotropic)
def diagonal_diagonal(P: Diagonal, Q: Diagonal | Isotropic) -> Diagonal:
    return Diagonal(P.diagonal() + Q.diagonal())


@register(ADD, Dense, PrecisionOperator)
def dense_anything(P: Dense, Q: PrecisionOperator) -> Dense:
    return Dense(P.matrix + Q.to_dense())


# -- Kronecker -------------------------------------------------------------------------------------------------


@register(ADD, KroneckerSum, Isotropic)
def kronecker_isotropic(P: KroneckerSum, Q: Isotropic) -> KroneckerSum:
    shift = Q.value if P.shift is None else P.shift + Q.value
    return KroneckerSum(P.terms, shift, P.roots, P.sizes)


@register(ADD, KroneckerSum, KroneckerSum)
def kronecker_kronecker(P: KroneckerSum, Q: KroneckerSum) -> KroneckerSum | None:
    if P.sizes != Q.sizes:
        return None
    terms = _merged([*P.terms, *Q.terms])
    shifts = [s for s in (P.shift, Q.shift) if s is not None]
    shift = shifts[0] + shifts[1] if len(shifts) == 2 else (shifts[0] if shifts else None)
    roots = None
    if len(terms) == 2 and len(P.terms) == len(Q.terms) == 1 and not (P.roots is None and Q.roots is None):
        roots = [*(P.roots or [(None, None)]), *(Q.roots or [(None, None)])]
    return KroneckerSum(terms, shift, roots, P.sizes)


def _merged(terms: list[Pair]) -> list[Pair]:
    """Terms with an identity on the same side added up: ``A (x) I + C (x) I = (A + C) (x) I``."""
    left = [M for M, other in terms if other is None and M is not None]
    right = [M for other, M in terms if other is None and M is not None]
    general = [pair for pair in terms if pair[0] is not None and pair[1] is not None]
    if left:
        general.append((functools.reduce(torch.add, left), None))
    if right:
        general.append((None, functools.reduce(torch.add, right)))
    return general


@register(ADD, SpectralKronecker, Isotropic)
def spectral_isotropic(P: SpectralKronecker, Q: Isotropic) -> SpectralKronecker:
    return P.with_eigenvalues(P.eigenvalues + Q.value[..., None, None])


@register(ADD, SpectralKronecker, SpectralKronecker)
def spectral_spectral(P: SpectralKronecker, Q: SpectralKronecker) -> SpectralKronecker | None:
    same = all(_equal(a, b) for a, b in ((P.QL, Q.QL), (P.QR, Q.QR)))
    return P.with_eigenvalues(P.eigenvalues + Q.eigenvalues) if same else None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal and can be seen to be: under a transform only if they are one tensor."""
    if a is b or not (is_concrete(a) and is_concrete(b)):
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


# -- blocks ----------------------------------------------------------------------------------------------------


@register(ADD, BlockDiag, Isotropic)
def blocks_isotropic(P: BlockDiag, Q: Isotropic) -> BlockDiag:
    return P.with_blocks([block + Isotropic(Q.value, block.size) for block in P.blocks])


@register(ADD, BlockDiag, Diagonal)
def blocks_diagonal(P: BlockDiag, Q: Diagonal) -> BlockDiag:
    parts = P.indices.split(Q.values, dim=-1)
    return P.with_blocks([block + Diagonal(part) for block, part in zip(P.blocks, parts, strict=True)])


@register(ADD, BlockDiag, BlockDiag)
def blocks_blocks(P: BlockDiag, Q: BlockDiag) -> BlockDiag | None:
    """Equal partitions add block by block; of nested ones the coarser stays, its blocks plus the finer's."""
    if P.indices == Q.indices:
        return P.with_blocks([a + b for a, b in zip(P.blocks, Q.blocks, strict=True)])
    coarse, fine = (P, Q) if len(P.blocks) <= len(Q.blocks) else (Q, P)
    owner = torch.empty(coarse.size, dtype=torch.long)
    position = torch.empty(coarse.size, dtype=torch.long)
    for i, index in enumerate(coarse.indices.blocks):
        owner[index] = i
        position[index] = torch.arange(len(index))
    members: list[list[PrecisionOperator]] = [[] for _ in coarse.blocks]
    places: list[list[Tensor]] = [[] for _ in coarse.blocks]
    for block, index in zip(fine.blocks, fine.indices.blocks, strict=True):
        if bool((owner[index] != owner[index[0]]).any()):
            return None
        members[int(owner[index[0]])].append(block)
        places[int(owner[index[0]])].append(position[index])
    blocks = []
    for block, parts, local in zip(coarse.blocks, members, places, strict=True):
        alone = len(parts) == 1 and IndexSet(local).consecutive
        blocks.append(block + (parts[0] if alone else BlockDiag(parts, local)))
    return coarse.with_blocks(blocks)


# -- low rank --------------------------------------------------------------------------------------------------


@register(ADD, Woodbury, PrecisionOperator)
def low_rank_anything(P: Woodbury, Q: PrecisionOperator) -> PrecisionOperator | None:
    if isinstance(Q, Dense):
        return None  # the table's other order: Dense + anything is Dense
    base = P.base + Q
    return P._with(base=base) if _stands_on(P, base) else None


@register(ADD, Woodbury, Woodbury)
def low_rank_low_rank(P: Woodbury, Q: Woodbury) -> Woodbury | None:
    base = P.base + Q.base
    if not (_stands_on(P, base) and _stands_on(Q, base)):
        return None
    if _plain_update(P) and _plain_update(Q):
        columns = joined_columns(unit_weight(P), unit_weight(Q))
        both = isinstance(P, LowRankPlusDiag) and isinstance(Q, LowRankPlusDiag)
        return (
            P._with(LowRankPlusDiag, base=base, U=columns, weight=None) if both else Woodbury(base, columns)
        )
    # A downdate stands outside an update, so that what it is taken from is positive definite.
    inner, outer = (Q, P) if P.sign < Q.sign else (P, Q)
    first = Woodbury(base, inner.U)._with(core=inner.core, weight=inner.weight, sign=inner.sign)
    return Woodbury(first, outer.U)._with(core=outer.core, weight=outer.weight, sign=outer.sign)


def _stands_on(P: Woodbury, base: PrecisionOperator) -> bool:
    """Whether the change that P is can be one of another base: features need a rule for it."""
    return isinstance(P.U, Tensor) or contracts(P.U, base)


def _plain_update(P: Woodbury) -> bool:
    return P.sign > 0 and P.core is None and isinstance(P.U, Tensor)
