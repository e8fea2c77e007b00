"""The part of a Kullback-Leibler divergence due to the shapes of two Gaussians, without cancellation.

    2 KL( N(m1, P^-1) | N(m2, Q^-1) ) = sum_i (r_i - log(1 + r_i)) + (m1 - m2)^T Q (m1 - m2),
    r = eig(P^-1 Q) - 1

The textbook form ``tr(P^-1 Q) - D + log det P - log det Q`` is a difference of numbers of the size of D and
loses a small divergence in their rounding. So r itself is formed wherever the two operators share a basis:

    diagonals               (q - p) / p
    Kronecker kinds         the same in a common eigenbasis, if that of one diagonalises the other
    Z + U U^T, c Z + V V^T  eigenvalues of a pencil of the size of both ranks, c - 1 elsewhere
    Dense with anything     eigenvalues of ``R^-1 (Q - P) R^-T`` with ``R R^T = P``
    equal partitions        block by block

and the textbook form serves the rest. Derivatives are always those of the textbook form, which are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin._tables import CONGRUENCE, TRACE_SOLVE, lookup
from curvlin.errors import NotClosedError
from curvlin.features.combined import CombinedFeatures
from curvlin.numerics.implicit import graft
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum, spectral_form
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.spectral import SpectralKronecker
from curvlin.precision.update import joined_columns

Known = tuple[PrecisionOperator, Any]
"""An operator in float64 and its factors."""
Change = tuple[Tensor, Tensor]
"""r and ``log(1 + r)``."""


def shape_divergence(P: PrecisionOperator, Q: PrecisionOperator) -> Tensor:
    """``sum_i (r_i - log(1 + r_i))`` with ``r = eig(P^-1 Q) - 1``, in float64; exactly 0 for equal operators.

    Raises:
        NotPositiveDefiniteError: if P or Q is singular.
        NotClosedError: if ``tr(P^-1 Q)`` is not closed for the two structures.
    """
    p, q = P._factored(), Q._factored()
    if not (P._is_concrete() and Q._is_concrete()):
        return _textbook(p, q)
    with torch.no_grad():
        value = _value(_detached(p), _detached(q)).expand(
            torch.broadcast_shapes(P.batch_shape, Q.batch_shape)
        )
    return graft(value, _textbook(p, q)) if P._needs_grad() or Q._needs_grad() else value


def _detached(known: Known) -> Known:
    return known[0].detach(), known[1]


def _textbook(p: Known, q: Known) -> Tensor:
    (P, p_factors), (Q, q_factors) = p, q
    rule = lookup(TRACE_SOLVE, type(P), type(Q))
    if rule is None:
        raise NotClosedError(
            f"the divergence between a {type(P).__name__} and a {type(Q).__name__} precision is not closed; "
            "project one onto the structure of the other, or use Dense for both"
        )
    trace: Tensor = rule(P, Q, p_factors)
    return trace - P.size - (Q._logdet(q_factors) - P._logdet(p_factors))


def _value(p: Known, q: Known) -> Tensor:
    P, Q = p[0], q[0]
    if identical(P, Q):
        return torch.zeros(P.batch_shape, dtype=torch.float64, device=P.device)
    blocks = _blocks(p, q)
    if blocks is not None:
        total = torch.zeros((), dtype=torch.float64, device=P.device)
        for pair in blocks:
            total = total + _value(*pair)
        return total
    if (change := _relative_change(p, q)) is not None:
        return _excess(*change).flatten(len(torch.broadcast_shapes(P.batch_shape, Q.batch_shape))).sum(-1)
    if (low_rank := _low_rank_sum(p, q)) is not None:
        return low_rank
    # The divergence is not negative; what rounding leaves below zero is nearer to it as zero.
    return _textbook(p, q).clamp(min=0.0)


def identical(P: PrecisionOperator, Q: PrecisionOperator) -> bool:
    """Whether the two are made of equal tensors in the same way."""
    if P is Q:
        return True
    if P._structure() != Q._structure():
        return False
    return all(torch.equal(s, t) for (s, _), (t, _) in zip(P._tensors(), Q._tensors(), strict=True))


def _excess(r: Tensor, log: Tensor) -> Tensor:
    """``r - log(1 + r)`` to full relative accuracy, from r and the logarithm."""
    # The series sum_k (-1)^k r^k / k from k = 2; eleven terms reach 1e-19 of the first one at |r| = 0.02.
    series = torch.zeros_like(r)
    for k in range(12, 1, -1):
        series = (1 if k % 2 == 0 else -1) / k + r * series
    return torch.where(r.abs() < 0.02, r * r * series, r - log)


def _relative_change(p: Known, q: Known) -> Change | None:
    """r and ``log(1 + r)``, any number of dimensions right of the batch; None where there is no short way."""
    P, Q = p[0], q[0]
    if isinstance(P, (Isotropic, Diagonal)) and isinstance(Q, (Isotropic, Diagonal)):
        return _with_log((Q.diagonal() - P.diagonal()) / P.diagonal())
    kronecker = (KroneckerSum, SpectralKronecker)
    if isinstance(P, (*kronecker, Isotropic)) and isinstance(Q, (*kronecker, Isotropic)):
        return _kronecker_change(p, q)
    if isinstance(P, Dense) or isinstance(Q, Dense):
        half = P._root_solve(Q.to_dense() - P.to_dense(), p[1])
        return _moderate(torch.linalg.eigvalsh(P._root_solve(half.mT, p[1])))
    return None


def _with_log(r: Tensor) -> Change:
    return r, torch.log1p(r)


def _moderate(r: Tensor) -> Change | None:
    """r, unless an eigenvalue is so far from 0 that its rounding spoils the others (textbook form)."""
    return _with_log(r) if bool((r.abs() < 0.5).all()) else None


# -- blocks --------------------------------------------------------------------------------------------------


def _blocks(p: Known, q: Known) -> list[tuple[Known, Known]] | None:
    """Pairs of blocks, where one operator is block-diagonal and the other can be cut in the same way."""
    (P, _), (Q, _) = p, q
    like = P if isinstance(P, BlockDiag) else Q
    if not isinstance(like, BlockDiag):
        return None
    left, right = _cut(p, like), _cut(q, like)
    return None if left is None or right is None else list(zip(left, right, strict=True))


def _cut(known: Known, like: BlockDiag) -> list[Known] | None:
    P, factors = known
    if isinstance(P, BlockDiag):
        return list(zip(P.blocks, factors, strict=True)) if P.indices == like.indices else None
    if isinstance(P, Isotropic):
        return [(Isotropic(P.value, size), factors) for size in like.indices.sizes]
    if isinstance(P, Diagonal):
        return [(Diagonal(values), factors) for values in like.indices.split(P.values, dim=-1)]
    return None


# -- Kronecker kinds -----------------------------------------------------------------------------------------


def _kronecker_change(p: Known, q: Known) -> Change | None:
    """``(d_Q - d_P) / d_P`` in the basis of one of the two, if it diagonalises the other."""
    for home, factors in (p, q):
        if not isinstance(home, (KroneckerSum, SpectralKronecker)):
            continue
        basis = spectral_form(home, factors)
        # Both numerators by the same rotation of what is stored: where roots made the basis, its eigenvalues
        # differ from the stored matrices by their rounding, and a small change would drown in that.
        rounding = max(p[0].resolution, q[0].resolution)
        before, after = (_spectrum_in(basis, P, 1.0 if P is home else rounding) for P in (p[0], q[0]))
        if before is not None and after is not None:
            return _with_log((after - before) / (basis[2] if p[0] is home else before))
    return None


def _spectrum_in(
    basis: tuple[Tensor | None, Tensor | None, Tensor], P: PrecisionOperator, rounding: float
) -> Tensor | None:
    """The diagonal ``(..., a, b)`` of P in a basis X, Y, if beside it there is nothing but (relative) rounding."""
    X, Y, d = basis
    a, b = d.shape[-2:]
    terms: list[tuple[Tensor | None, Tensor | None]] = []
    if isinstance(P, SpectralKronecker):
        aligned = P.sizes == (a, b) and _is_identity(X, P.QL) and _is_identity(Y, P.QR)
        return P.eigenvalues if aligned else None
    if isinstance(P, Isotropic):
        shift: Tensor | None = P.value
    elif isinstance(P, KroneckerSum) and P.sizes == (a, b):
        terms, shift = list(P.terms), P.shift
    else:
        return None
    weights = [torch.ones((), dtype=d.dtype, device=d.device)] * len(terms)
    if shift is not None:
        terms, weights = [*terms, (None, None)], [*weights, shift]
    total = torch.zeros((), dtype=d.dtype, device=d.device)
    for weight, (L, R) in zip(weights, terms, strict=True):
        left, right = _diagonal_in(X, L, a, d, rounding), _diagonal_in(Y, R, b, d, rounding)
        if left is None or right is None:
            return None
        total = total + weight[..., None, None] * left[..., :, None] * right[..., None, :]
    return total


def _diagonal_in(
    X: Tensor | None, M: Tensor | None, size: int, like: Tensor, rounding: float
) -> Tensor | None:
    """The diagonal of ``X^T M X`` (None is the identity) if its other entries are rounding."""
    if X is None and M is None:
        return torch.ones(size, dtype=like.dtype, device=like.device)
    inner = M if X is None else X.mT @ (X if M is None else M @ X)
    assert inner is not None
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    rest = torch.linalg.matrix_norm(inner - torch.diag_embed(diagonal))
    return diagonal if bool((rest <= 8 * size * rounding * torch.linalg.matrix_norm(inner)).all()) else None


def _is_identity(X: Tensor | None, Q: Tensor) -> bool:
    """Whether the columns of X are those of the orthogonal Q, in order."""
    if X is None:
        return False
    rounding = 8 * Q.shape[-1] * torch.finfo(Q.dtype).eps
    return bool(((X - Q).abs() <= rounding).all())


# -- low rank ------------------------------------------------------------------------------------------------


def _low_rank_sum(p: Known, q: Known) -> Tensor | None:
    """In coordinates that whiten Z, P is ``p I + s_1 V_1 V_1^T`` and Q is ``q I + s_2 V_2 V_2^T``."""
    excess = _proportion(p[0], q[0])
    if excess is not None:
        return p[0].size * _excess(*_with_log(excess))
    P, Q = (_rooted(known) for known in (p, q))
    if isinstance(P, Woodbury):
        home, factors, scale = P._rooted_normal(p[1])
        P, Q = home, Q / scale
    elif isinstance(Q, Woodbury):
        home, factors, scale = Q._rooted_normal(q[1])
        P, Q = P / scale, home
    else:
        return None
    p_excess, q_excess = (_proportion(home.base, X.base if isinstance(X, Woodbury) else X) for X in (P, Q))
    if p_excess is None or q_excess is None:
        return None
    changes = [X for X in (P, Q) if isinstance(X, Woodbury)]
    if len(changes) == 1 and bool((p_excess == q_excess).all()):
        return _excess(*_one_change(home, factors, update=home is Q)).sum(-1)
    roots = _column_roots(home.base, factors.base, changes)
    if roots is None:
        return None
    grown = {id(X): X._weighted(A @ A.mT) for X, A in zip(changes, roots, strict=True)}
    m = roots[0].shape[-2]
    eye = torch.eye(m, dtype=torch.float64, device=home.device)
    zero = torch.zeros_like(eye)
    before, after = grown.get(id(P), zero), grown.get(id(Q), zero)
    apart = (q_excess - p_excess)[..., None, None]
    lower = torch.linalg.cholesky_ex((1 + p_excess)[..., None, None] * eye + before).L
    half = torch.linalg.solve_triangular(lower, apart * eye + after - before, upper=False)
    inside = _moderate(torch.linalg.eigvalsh(torch.linalg.solve_triangular(lower, half.mT, upper=False)))
    outside = _moderate((q_excess - p_excess) / (1 + p_excess))
    if inside is None or outside is None:
        return None
    # Directions of the pencil beyond D do not exist; they count as "outside" and are taken off again there.
    return _excess(*inside).sum(-1) + (home.size - m) * _excess(*outside)


def _rooted(known: Known) -> PrecisionOperator:
    P, factors = known
    return P._rooted(factors)[0] if isinstance(P, Woodbury) else P


def _proportion(Z: PrecisionOperator, other: PrecisionOperator) -> Tensor | None:
    """``c - 1`` if `other` is ``c Z``, known from its tensors."""
    rounding = 4 * max(Z.resolution, other.resolution)
    if isinstance(Z, (Isotropic, Diagonal)) and isinstance(other, (Isotropic, Diagonal)):
        Z, other = Diagonal(Z.diagonal()), Diagonal(other.diagonal())
    if identical(Z, other):
        return torch.zeros(Z.batch_shape, dtype=torch.float64, device=Z.device)
    if isinstance(Z, Woodbury) and isinstance(other, Woodbury):
        return _proportion_of_changed(Z, other)
    if Z._structure() != other._structure():
        return None
    before, after = Z.diagonal(), other.diagonal()
    excess = (after - before).sum(-1) / before.sum(-1)
    for (s, _), (t, _) in zip(Z._scale(1 + excess)._tensors(), other._tensors(), strict=True):
        if not torch.allclose(s, t, rtol=rounding, atol=rounding * float(t.abs().max())):
            return None
    return excess


def _proportion_of_changed(P: Woodbury, Q: Woodbury) -> Tensor | None:
    """As `_proportion`: a factor common to the base and to the weight of the change."""
    excess = _proportion(P.base, Q.base)
    if excess is None or not identical(P._with(weight=None), Q._with(base=P.base, weight=None)):
        return None
    ones = torch.ones((), dtype=torch.float64, device=P.device)
    before, after = (ones if X.weight is None else X.weight for X in (P, Q))
    rounding = 4 * max(P.resolution, Q.resolution)
    return excess if torch.allclose((1 + excess) * before, after, rtol=rounding, atol=0.0) else None


def _one_change(P: Woodbury, factors: Any, *, update: bool) -> Change:
    """From Z to ``Z + s V V^T``, or back: r is ``s sigma^2``, or what undoes it."""
    gain = P.sign * factors.gain
    log = torch.log1p(gain) if P.sign > 0 else factors.h.log()
    return (gain, log) if update else (-gain / factors.h, -log)


def _column_roots(Z: PrecisionOperator, factors: Any, changes: list[Woodbury]) -> list[Tensor] | None:
    """``A_1, A_2`` with ``A_i^T A_j = U_i^T Z^-1 U_j``, of few rows."""
    ranks = [X.rank for X in changes]
    columns = [X.U.double() for X in changes if isinstance(X.U, Tensor)]
    if len(columns) == len(changes):
        white = Z._root_solve(joined_columns(*columns) if len(columns) > 1 else columns[0], factors)
        return list(torch.linalg.qr(white, mode="r").R.split(ranks, dim=-1))
    rows = []
    for left in changes:
        row = [_gram(Z, factors, left, right) for right in changes]
        blocks = [block for block in row if block is not None]
        if len(blocks) < len(row):
            return None
        rows.append(torch.cat(blocks, dim=-1))
    gram = torch.cat(rows, dim=-2)
    spectrum, E = torch.linalg.eigh((gram + gram.mT) / 2)
    # The root of a rounding error is not one: common directions of U_1 and U_2 leave zero eigenvalues.
    rounding = gram.shape[-1] * torch.finfo(gram.dtype).eps * spectrum[..., -1:]
    root = torch.where(spectrum > rounding, spectrum, 0.0).sqrt().unsqueeze(-1) * E.mT
    return list(root.split(ranks, dim=-1))


def _gram(Z: PrecisionOperator, factors: Any, P: Woodbury, Q: Woodbury) -> Tensor | None:
    """``U^T Z^-1 V`` for the columns U of P and V of Q."""
    if isinstance(Q.U, Tensor):
        return P._collect(Z._solve(Q.U.double(), factors))
    if isinstance(P.U, Tensor):
        return Q._collect(Z._solve(P.U.double(), factors)).mT
    rule = lookup(CONGRUENCE, type(P.U), type(Z))
    combined = isinstance(P.U, CombinedFeatures) or isinstance(Q.U, CombinedFeatures)
    if rule is None or not (combined or type(P.U) is type(Q.U)):
        return None
    K: Tensor = rule(P.U, Q.U, Z, factors, "joint", None)
    return K.double().flatten(-2).flatten(-3, -2)
