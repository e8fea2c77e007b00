"""The congruence table: ``Phi P^-1 Psi^T`` for every pair of feature kind and operator kind that is closed.

    features    P: Isotropic, Diagonal   Kronecker kinds   Dense   BlockDiag        Woodbury kinds
    KhatriRao      contraction           contraction       rows    -                base, less low rank
    Block          part by part          -                 rows    block by block   base, less low rank
    Dense          rows                  rows              rows    rows             base, less low rank
    Combined       by the rule of the rows that are combined

*contraction*: nothing of size D per row is formed (`curvlin.numerics.contraction`). *rows*: rows are
multiplied out chunk by chunk and solved for. A pair that is not in the table is refused.

A rule is called with P in float64 and its factors, the features in the caller's dtype, and a layout:
"per_sample" ``(N, R, R)``, "joint" ``(N, R, M, Q)`` or "diagonal" ``(N, R)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from curvlin._tables import CONGRUENCE, Rule, lookup, register
from curvlin._tree import is_concrete, needs_grad
from curvlin.errors import NotClosedError
from curvlin.features.base import FeatureOperator
from curvlin.features.block import BlockFeatures
from curvlin.features.combined import CombinedFeatures
from curvlin.features.dense import DenseFeatures
from curvlin.features.khatri_rao import KhatriRaoFeatures, same_layer
from curvlin.numerics import contraction
from curvlin.numerics.chunks import joined, pieces, recomputing
from curvlin.numerics.implicit import graft
from curvlin.numerics.repeats import once, repeats
from curvlin.numerics.scaling import power_of_two
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum, spectral_form
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.low_rank_core import CanonicalFactors
from curvlin.precision.spectral import SpectralKronecker

Features = FeatureOperator | None
Chunk = int | None
Sides = tuple[Tensor, Tensor]
"""left and right of Khatri-Rao features."""


# -- rows, solved for ----------------------------------------------------------------------------------------


@register(CONGRUENCE, DenseFeatures, PrecisionOperator)
@register(CONGRUENCE, DenseFeatures, Woodbury)
@register(CONGRUENCE, FeatureOperator, Dense)
def by_rows(
    Phi: FeatureOperator, Psi: Features, P: PrecisionOperator, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """Rows multiplied out one chunk at a time and solved for in float64; exact for every P."""
    if layout == "joint" and isinstance(Phi, DenseFeatures) and Psi is None:
        flat = DenseFeatures(Phi.matrix.flatten(-3, -2).unsqueeze(-3))
        K = by_rows(flat, None, P, factors, "per_sample", chunk).squeeze(-3)
        return K.reshape(*K.shape[:-2], *Phi.shape[-3:-1], *Phi.shape[-3:-1])
    if layout == "joint":
        other = Phi if Psi is None else Psi
        if isinstance(Phi, DenseFeatures) and not isinstance(other, DenseFeatures):
            # The side that is dense anyway is the one to solve for.
            return by_rows(other, Phi, P, factors, layout, chunk).movedim((-4, -3), (-2, -1))
        K = _solved(Phi, other, P, factors, chunk)
        return _symmetric(K) if Psi is None else K

    if isinstance(Phi, DenseFeatures) and repeats(Phi.matrix, -3):
        K = by_rows(Phi[:1], None, P, factors, layout, chunk)
        dim = -2 if layout == "diagonal" else -3
        return K.repeat_interleave(Phi.n_samples, dim=dim)

    def variances(n: slice) -> Tensor:
        rows = Phi[n].to_dense().double()
        X = rows.flatten(-3, -2).mT
        if layout == "diagonal":
            quad = P._inv_quad(X, factors)
            return quad.reshape(*quad.shape[:-1], *rows.shape[-3:-1])
        # A Gram matrix of whitened rows is positive semidefinite and loses digits only with the root of P's
        # condition; derivatives come from the solve, which always has them.
        with torch.no_grad():
            white = _split(P.detach()._root_solve(X.detach(), factors), rows)
            value = white @ white.mT
            value = (value + value.mT) / 2  # which a product of two matrices is not on every machine
        if not (P._needs_grad() or needs_grad(rows)):
            return value
        K = rows @ _split(P._solve(X, factors), rows).mT
        return graft(value, (K + K.mT) / 2)

    samples = _row_pieces(Phi, P, chunk)
    kernel = recomputing(variances, len(samples), *_tensors(Phi, P))
    return joined([kernel(n) for n in samples], dim=-2 if layout == "diagonal" else -3)


@register(CONGRUENCE, DenseFeatures, Diagonal)
def _dense_diagonal(
    Phi: DenseFeatures, Psi: Features, P: Diagonal, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """As for every P; but the rows of a batch of diagonals are the same, and their products are summed for all."""
    if layout == "joint" or not P.batch_shape or Phi.batch_shape or repeats(Phi.matrix, -3):
        return by_rows(Phi, Psi, P, factors, layout, chunk)
    diagonal = layout == "diagonal"

    def some(n: slice) -> Tensor:
        return contraction.rows_with_many_weights(Phi.matrix[n].double(), 1 / P.values, diagonal=diagonal)

    products = Phi.n_rows * (1 if diagonal else Phi.n_rows)
    samples = pieces(Phi.n_samples, 8 * (Phi.n_rows + products) * Phi.size, chunk, _worth_a_call(Phi))
    kernel = recomputing(some, len(samples), *_tensors(Phi, P))
    return joined([kernel(n) for n in samples], dim=-2 if diagonal else -3)


def _split(X: Tensor, rows: Tensor | FeatureOperator) -> Tensor:
    """Columns ``(..., m, n R)`` as rows per sample ``(..., n, R, m)``."""
    return X.mT.reshape(*X.shape[:-2], *rows.shape[-3:-1], X.shape[-2])


def _solved(
    Phi: FeatureOperator, Psi: FeatureOperator, P: PrecisionOperator, factors: Any, chunk: Chunk
) -> Tensor:
    """``Phi P^-1 Psi^T``, with the rows of Psi as right-hand sides."""
    Phi64 = Phi.to(torch.float64)

    def columns(m: slice) -> Tensor:
        rows = Psi[m].to_dense().double()
        K = Phi64._matmul(P._solve(rows.flatten(-3, -2).mT, factors))
        return K.reshape(*K.shape[:-1], *rows.shape[-3:-1])

    samples = _row_pieces(Psi, P, chunk)
    kernel = recomputing(columns, len(samples), *_tensors(Phi, Psi, P))
    return joined([kernel(m) for m in samples], dim=-2)


def _row_pieces(Phi: FeatureOperator, P: PrecisionOperator, chunk: Chunk) -> list[slice]:
    batch = torch.broadcast_shapes(Phi.batch_shape, P.batch_shape).numel()
    # A row in float64, and its solution.
    return pieces(Phi.n_samples, 2 * 8 * batch * Phi.n_rows * Phi.size, chunk, _worth_a_call(Phi))


def _worth_a_call(Phi: FeatureOperator) -> int:
    """Samples that make reading the factors of P once per chunk a small part of a solve."""
    return math.ceil(64 / Phi.n_rows)


def _tensors(*trees: FeatureOperator | PrecisionOperator) -> list[Tensor]:
    return [tensor for tree in trees for tensor, _ in tree._tensors()]


def _symmetric(K: Tensor) -> Tensor:
    return (K + K.movedim((-4, -3), (-2, -1))) / 2


# -- Khatri-Rao features, contracted -------------------------------------------------------------------------


@register(CONGRUENCE, KhatriRaoFeatures, Isotropic)
def _khatri_rao_isotropic(
    Phi: KhatriRaoFeatures, Psi: Features, P: Isotropic, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """``Phi Psi^T / value``: inner products only."""
    if not _same_kind(Psi, KhatriRaoFeatures):
        return _mixed(Phi, Psi, P, factors, chunk)
    K = _contracted((Phi.left, Phi.right), _sides(Psi, Phi), None, layout, chunk)
    return K / _as_batch(P.value, layout)


@register(CONGRUENCE, KhatriRaoFeatures, Diagonal)
def _khatri_rao_diagonal(
    Phi: KhatriRaoFeatures, Psi: Features, P: Diagonal, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """Weights ``1 / d_oi``."""
    if not _same_kind(Psi, KhatriRaoFeatures):
        return _mixed(Phi, Psi, P, factors, chunk)
    d = P.values.reshape(*P.values.shape[:-1], Phi.out_features, Phi.in_features)
    return _contracted((Phi.left, Phi.right), _sides(Psi, Phi), 1 / d, layout, chunk)


@register(CONGRUENCE, KhatriRaoFeatures, KroneckerSum)
@register(CONGRUENCE, KhatriRaoFeatures, SpectralKronecker)
def _khatri_rao_kronecker(
    Phi: KhatriRaoFeatures,
    Psi: Features,
    P: KroneckerSum | SpectralKronecker,
    factors: Any,
    layout: str,
    chunk: Chunk,
) -> Tensor:
    """Weights ``1 / d_oi`` in the basis of P, into which the two sides of the features are rotated."""
    if not _same_kind(Psi, KhatriRaoFeatures):
        return _mixed(Phi, Psi, P, factors, chunk)
    if P.sizes != (Phi.out_features, Phi.in_features):
        raise ValueError(
            f"Phi must have out and in sizes {P.sizes} like the factors of P, found "
            f"{(Phi.out_features, Phi.in_features)}"
        )
    if P._factors_need_grad():
        # The basis is a constant to autograd, so only a solve has the derivatives of the factors.
        return by_rows(Phi, Psi, P, factors, layout, chunk)
    X, Y, d = spectral_form(P, factors)
    # An orthogonal rotation keeps the accuracy of the features' dtype; that of a pencil need not.
    dtype = _at_least_float32(Phi.dtype) if P.orthogonal else torch.float64
    others = _sides(Psi, Phi)
    return _contracted(
        _rotated((Phi.left, Phi.right), X, Y, dtype),
        None if others is None else _rotated(others, X, Y, dtype),
        1 / d,
        layout,
        chunk,
    )


def _rotated(Phi: Sides, X: Tensor | None, Y: Tensor | None, dtype: torch.dtype) -> Sides:
    """The two sides of ``Phi (X (x) Y)``."""
    left, right = _in_dtype(Phi, dtype)
    if X is not None:
        left = once(lambda some: _times_each(some, X), left, dim=-4)
    if Y is not None:
        rotated = _times(right.flatten(-3, -2), Y)
        right = rotated.reshape(*rotated.shape[:-2], *right.shape[-3:])
    return left, right


def _times_each(left: Tensor, X: Tensor) -> Tensor:
    rotated = _times(left.flatten(-4, -2), X)
    return rotated.reshape(*rotated.shape[:-2], *left.shape[-4:])


def _in_dtype(Phi: Sides, dtype: torch.dtype) -> Sides:
    return once(lambda left: left.to(dtype), Phi[0], dim=-4), Phi[1].to(dtype)


def _times(rows: Tensor, X: Tensor) -> Tensor:
    """``rows X`` in the dtype of the rows, X narrowed some columns at a time: no second copy of a large basis."""
    if X.dtype == rows.dtype or X.numel() <= _NARROWED:
        return rows @ X.to(rows.dtype)
    step = max(1, _NARROWED // X.shape[-2])
    return torch.cat([rows @ part.to(rows.dtype) for part in X.split(step, dim=-1)], dim=-1)


_NARROWED = 2**20
"""Entries of a basis narrowed at a time: 4 MiB in float32."""


def _contracted(Phi: Sides, Psi: Sides | None, weight: Tensor | None, layout: str, chunk: Chunk) -> Tensor:
    """``Phi diag(weight) Psi^T`` in the dtype of the features (float32 at least), returned in float64."""
    dtype = _at_least_float32(Phi[0].dtype)
    left, right = _in_dtype(Phi, dtype)
    scale = None
    if weight is not None:
        # Weights of any magnitude fit the dtype of the features once their power of two is taken out.
        scale = power_of_two(weight)
        weight = (weight / scale[..., None, None]).to(dtype)
    if layout == "per_sample":
        K = contraction.per_sample(left, right, weight, chunk)
    elif layout == "diagonal":
        K = contraction.per_sample_diagonal(left, right, weight, chunk)
    elif Psi is None:
        K = _symmetric(contraction.cross(left, right, left, right, weight, chunk))
    else:
        K = contraction.cross(left, right, *_in_dtype(Psi, dtype), weight, chunk)
    return K.double() if scale is None else K.double() * _as_batch(scale, layout)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_OWN = {"per_sample": 3, "joint": 4, "diagonal": 2}


def _as_batch(value: Tensor, layout: str) -> Tensor:
    """One number per batch element, to multiply a result of this layout."""
    return value.reshape(*value.shape, *(1,) * _OWN[layout])


def _sides(Psi: Features, Phi: KhatriRaoFeatures) -> Sides | None:
    """Left and right of Psi, which is of Phi's layer."""
    if Psi is None:
        return None
    assert isinstance(Psi, KhatriRaoFeatures)
    same_layer("Psi", Psi, Phi)
    return Psi.left, Psi.right


def _same_kind(Psi: Features, kind: type[FeatureOperator]) -> bool:
    return Psi is None or isinstance(Psi, kind)


def _mixed(Phi: FeatureOperator, Psi: Features, P: PrecisionOperator, factors: Any, chunk: Chunk) -> Tensor:
    """Two kinds of features: closed if one of them is dense, or made of rows of the other kind."""
    if isinstance(Psi, DenseFeatures):
        return _solved(Phi, Psi, P, factors, chunk)
    if isinstance(Psi, CombinedFeatures):
        return _combined(Psi, Phi, P, factors, "joint", chunk).movedim((-4, -3), (-2, -1))
    raise NotClosedError(
        f"no exact rule for {type(Phi).__name__} P^-1 {type(Psi).__name__}^T with P a {type(P).__name__}; "
        "use features of one kind, or DenseFeatures(Psi.to_dense())"
    )


def contracts(Phi: FeatureOperator, P: PrecisionOperator) -> bool:
    """Whether ``Phi P^-1 Phi^T`` has a rule, of every part that it is made of."""
    if isinstance(P, Woodbury):
        return contracts(Phi, P.base)
    if isinstance(Phi, CombinedFeatures):
        return contracts(Phi.rows, P)
    if isinstance(Phi, BlockFeatures) and isinstance(P, BlockDiag):
        return Phi.indices == P.indices and all(map(contracts, Phi.parts, P.blocks))
    return lookup(CONGRUENCE, type(Phi), type(P)) is not None


# -- combined features ---------------------------------------------------------------------------------------


@register(CONGRUENCE, CombinedFeatures, PrecisionOperator)
def _combined(
    Phi: CombinedFeatures, Psi: Features, P: PrecisionOperator, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """``W (Phi P^-1 Psi^T) W^T`` by the rule of the rows, for all of them together."""
    rule = lookup(CONGRUENCE, type(Phi.rows), type(P))
    if rule is None:
        raise NotClosedError(
            f"no exact rule for combined {type(Phi.rows).__name__} with P a {type(P).__name__}; use rows that match it"
        )
    others = Psi.rows if isinstance(Psi, CombinedFeatures) else Psi
    own = others is None or others is Phi.rows
    K: Tensor = rule(Phi.rows, None if own else others, P, factors, "joint", chunk).double()
    if layout == "joint":
        found = Phi.combined_sides(K, Phi if Psi is None else Psi)
        return _symmetric(found) if Psi is None else found
    left = Phi.combined(K.flatten(-2).flatten(-3, -2))
    weights = Phi.weights.to(left.dtype)
    if layout == "diagonal":
        return torch.linalg.vecdot(left, weights)
    found = left @ weights.mT
    return (found + found.mT) / 2


# -- block features ------------------------------------------------------------------------------------------


@register(CONGRUENCE, BlockFeatures, BlockDiag)
def _block_by_block(
    Phi: BlockFeatures, Psi: Features, P: BlockDiag, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """The sum over blocks, each by its own rule."""
    if not _same_kind(Psi, BlockFeatures):
        return _mixed(Phi, Psi, P, factors, chunk)
    for name, features in (("Phi", Phi), ("Psi", cast(BlockFeatures | None, Psi))):
        if features is not None and features.indices != P.indices:
            raise NotClosedError(
                f"{name} must be cut into the blocks of P: found blocks of sizes {features.indices.sizes}, "
                f"expected {P.indices.sizes} with the same indices; pass indices=P.indices to BlockFeatures"
            )
    return _parts(Phi, Psi, P.blocks, factors, layout, chunk)


@register(CONGRUENCE, BlockFeatures, Diagonal)
def _block_diagonal(
    Phi: BlockFeatures, Psi: Features, P: Diagonal, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """A diagonal is cut into the parts of the features."""
    if not _same_kind(Psi, BlockFeatures):
        return _mixed(Phi, Psi, P, factors, chunk)
    blocks = tuple(Diagonal(values) for values in Phi.indices.split(P.values, dim=-1))
    return _parts(Phi, Psi, blocks, (factors,) * len(blocks), layout, chunk)


@register(CONGRUENCE, BlockFeatures, Isotropic)
def _block_isotropic(
    Phi: BlockFeatures, Psi: Features, P: Isotropic, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """A multiple of the identity is cut into the parts of the features."""
    if not _same_kind(Psi, BlockFeatures):
        return _mixed(Phi, Psi, P, factors, chunk)
    blocks = tuple(Isotropic(P.value, size) for size in Phi.indices.sizes)
    return _parts(Phi, Psi, blocks, (factors,) * len(blocks), layout, chunk)


def _parts(
    Phi: BlockFeatures,
    Psi: Features,
    blocks: tuple[PrecisionOperator, ...],
    factors: tuple[Any, ...],
    layout: str,
    chunk: Chunk,
) -> Tensor:
    """``sum_b Phi_b P_b^-1 Psi_b^T`` in float64."""
    if isinstance(Psi, BlockFeatures) and Psi.indices != Phi.indices:
        raise NotClosedError(
            f"Psi must be cut into the parts of Phi: found blocks of sizes {Psi.indices.sizes}, expected "
            f"{Phi.indices.sizes} with the same indices"
        )
    others = Psi.parts if isinstance(Psi, BlockFeatures) else (None,) * len(blocks)

    def part(b: int) -> Tensor:
        rule = lookup(CONGRUENCE, type(Phi.parts[b]), type(blocks[b]))
        if rule is None:
            raise NotClosedError(
                f"no exact rule for block {b}: {type(Phi.parts[b]).__name__} features with a "
                f"{type(blocks[b]).__name__}; use a feature operator that matches it"
            )
        K: Tensor = rule(Phi.parts[b], others[b], blocks[b], factors[b], layout, chunk)
        return K.double()

    return functools.reduce(torch.add, (part(b) for b in range(len(blocks))))


# -- a base changed in a few directions ----------------------------------------------------------------------


@register(CONGRUENCE, FeatureOperator, Woodbury)
def _less_low_rank(
    Phi: FeatureOperator, Psi: Features, P: Woodbury, factors: Any, layout: str, chunk: Chunk
) -> Tensor:
    """``Phi Z^-1 Psi^T - s w (Phi Z^-1 U) H^-1 (U^T Z^-1 Psi^T)`` with ``H = I + s w U^T Z^-1 U``.

    The difference of two positive terms loses digits where the features lie in the range of U and the update is
    large; samples for which it has lost too many are solved for by their rows.
    """
    if not _same_kind(Psi, type(Phi)):
        return _mixed(Phi, Psi, P, factors, chunk)
    if isinstance(factors, CanonicalFactors) and P._needs_grad() and not factors.definite:
        return by_rows(Phi, Psi, P, factors, layout, chunk)
    P, factors, scale = P._rooted_normal(factors)
    whitened = _whitening(P, factors, chunk)

    def less(first: FeatureOperator, second: Features, loss: Tensor) -> Tensor:
        kept = _base_rule(Phi, P)(first, second, P.base, factors.base, layout, chunk).double()
        result = kept - P.sign * loss
        if _has_cancelled(result, kept, layout, cross=second is not None):
            value = by_rows(first, second, P, factors, layout, chunk)
            result = graft(value.detach(), result) if needs_grad(result) else value
        return result / _as_batch(scale, layout)

    if layout == "joint":
        first = Phi.to(torch.float64)
        other = first if Psi is None else Psi.to(torch.float64)
        left = whitened(first)
        loss = left.mT @ (left if Psi is None else whitened(other))
        loss = loss.reshape(*loss.shape[:-2], *first.shape[-3:-1], *other.shape[-3:-1])
        return less(first, None if Psi is None else other, loss)

    def variances(n: slice) -> Tensor:
        part = Phi[n].to(torch.float64)
        t = _split(whitened(part), part)
        return less(part, None, t.square().sum(-1) if layout == "diagonal" else t @ t.mT)

    batch = torch.broadcast_shapes(Phi.batch_shape, P.batch_shape).numel()
    samples = pieces(Phi.n_samples, 3 * 8 * batch * Phi.n_rows * P.rank, chunk, _worth_a_call(Phi))
    kernel = recomputing(variances, len(samples), *_tensors(Phi, P))
    return joined([kernel(n) for n in samples], dim=-2 if layout == "diagonal" else -3)


KEPT = 1e-4
"""The part that a difference may leave of its terms before its twelve good digits are too few."""

_KEPT_ACROSS = 1e-2
"""The same for the largest covariance of a row with others, which may itself be small beside the rows' variances."""


def _has_cancelled(result: Tensor, kept: Tensor, layout: str, cross: bool) -> bool:
    """Whether values may be looked at, and are far smaller than what they are left of."""
    if not is_concrete(result):
        return False
    least = _KEPT_ACROSS if cross else KEPT
    return bool((_sizes(result, layout, cross) < least * _sizes(kept, layout, cross)).any())


def _sizes(K: Tensor, layout: str, cross: bool) -> Tensor:
    """The variances in K; where samples meet others, the magnitude of the largest covariance of each row with them."""
    if layout == "diagonal":
        return K
    matrix = K.flatten(-2).flatten(-3, -2) if layout == "joint" else K
    if cross:
        return torch.cat([matrix.abs().amax(-1), matrix.abs().amax(-2)], dim=-1)
    return matrix.diagonal(dim1=-2, dim2=-1)


def _whitening(P: Woodbury, factors: Any, chunk: Chunk) -> Callable[[FeatureOperator], Tensor]:
    """The function ``Phi -> H^-1/2 U^T Z^-1 Phi^T``, ``(..., k, N R)``."""
    solved = P.base._solve(P.U.double(), factors.base) if isinstance(P.U, Tensor) else None
    lower = torch.linalg.cholesky_ex(P._capacitance(factors.base)).L if P._needs_grad() else None

    def whitened(Phi: FeatureOperator) -> Tensor:
        if solved is not None:
            along = Phi._matmul(solved)
        else:
            along = _base_rule(Phi, P)(Phi, P.U, P.base, factors.base, "joint", chunk).double().flatten(-2)
        along = along.flatten(-3, -2).mT
        if lower is None:
            return (factors.W / factors.h.sqrt().unsqueeze(-2)).mT @ along
        t: Tensor = torch.linalg.solve_triangular(lower, along, upper=False)
        return t

    return whitened


def _base_rule(Phi: FeatureOperator, P: Woodbury) -> Rule:
    rule = lookup(CONGRUENCE, type(Phi), type(P.base))
    if rule is None:
        raise NotClosedError(
            f"no exact rule for {type(Phi).__name__} Z^-1 {type(Phi).__name__}^T with Z the "
            f"{type(P.base).__name__} under a Woodbury; use features whose blocks match it"
        )
    return rule
