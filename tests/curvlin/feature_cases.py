"""Feature operators and precisions beside their dense matrices, written out from the definitions.

Nothing here calls a method of the operators under test: rows are Kronecker products of vectors, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlin import (
    BlockDiag,
    BlockFeatures,
    CombinedFeatures,
    Dense,
    DenseFeatures,
    Diagonal,
    FeatureOperator,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    LowRankPlusDiag,
    PrecisionOperator,
    SpectralKronecker,
    Woodbury,
)
from curvlin.numerics import chunks

OUT, IN = 3, 4
"""The layer of the Khatri-Rao features; D = 12, the blocks of the block features are 12 + 3."""
ORDER = torch.tensor([4, 0, 9, 13, 2, 7, 11, 5, 14, 1, 8, 3, 12, 10, 6])
"""Interleaved coordinates of the two blocks."""
BLOCKS = [ORDER[:12], ORDER[12:]]


@dataclass(frozen=True)
class Features:
    """A feature operator and its rows ``(*batch, N, R, D)``."""

    operator: FeatureOperator
    rows: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=g)


def khatri_rao_rows(left: Tensor, right: Tensor) -> Tensor:
    """``sum_s left_nrs (x) right_ns``, one Kronecker product after another."""
    N, R, S, _ = left.shape
    rows = [
        [sum(torch.kron(left[n, r, s], right[n, s]) for s in range(S)) for r in range(R)] for n in range(N)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def features(
    kind: str, seed: int, N: int = 3, R: int = 2, S: int = 2, batch: tuple[int, ...] = ()
) -> Features:
    """`kind` is "dense", "khatri_rao" (D = 12), "block" (D = 15, a Khatri-Rao and a dense part) or "combined".

    The last are combinations of as many samples' rows as there are, of one layer (D = 12).
    """
    if batch:
        singles = [features(kind, seed + 1000 * b, N, R, S) for b in range(batch[0])]
        return Features(_stacked([s.operator for s in singles]), torch.stack([s.rows for s in singles]))
    g = generator(seed)
    left, right, dense = randn(g, N, R, S, OUT), randn(g, N, S, IN), randn(g, N, R, 3)
    rows = khatri_rao_rows(left, right)
    if kind == "khatri_rao":
        return Features(KhatriRaoFeatures(left, right), rows)
    if kind == "dense":
        return Features(DenseFeatures(rows), rows)
    if kind == "combined":
        weights = randn(g, N, R, N * R)
        combined = torch.einsum("nrj,jd->nrd", weights, rows.flatten(0, 1))
        return Features(CombinedFeatures(weights, KhatriRaoFeatures(left, right)), combined)
    whole = torch.zeros(N, R, 15, dtype=torch.float64)
    whole[..., BLOCKS[0]], whole[..., BLOCKS[1]] = rows, dense
    return Features(BlockFeatures([KhatriRaoFeatures(left, right), DenseFeatures(dense)], BLOCKS), whole)


def _stacked(operators: list[FeatureOperator]) -> FeatureOperator:
    first = operators[0]
    if isinstance(first, DenseFeatures):
        return DenseFeatures(torch.stack([o.matrix for o in operators]))
    if isinstance(first, KhatriRaoFeatures):
        return KhatriRaoFeatures(
            torch.stack([o.left for o in operators]), torch.stack([o.right for o in operators])
        )
    if isinstance(first, CombinedFeatures):
        return CombinedFeatures(
            torch.stack([o.weights for o in operators]), _stacked([o.rows for o in operators])
        )
    parts = [_stacked([o.parts[b] for o in operators]) for b in range(len(first.parts))]
    return BlockFeatures(parts, first.indices)


KINDS = ("dense", "khatri_rao", "block", "combined")


@st.composite
def some_features(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, batch: bool = True) -> Features:
    return features(
        draw(st.sampled_from(kinds)),
        draw(st.integers(0, 2**20)),
        N=draw(st.integers(1, 4)),
        R=draw(st.integers(1, 3)),
        S=draw(st.integers(1, 5)),
        batch=draw(st.sampled_from([(), (2,)])) if batch else (),
    )


# -- precisions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """A precision operator and its matrix ``(*batch, D, D)``."""

    operator: PrecisionOperator
    matrix: Tensor


def spd(g: torch.Generator, n: int) -> Tensor:
    X = randn(g, n, n)
    return X @ X.mT / n + 0.3 * torch.eye(n, dtype=torch.float64)


def orthogonal(g: torch.Generator, n: int) -> Tensor:
    return torch.linalg.qr(randn(g, n, n)).Q


def _isotropic(g: torch.Generator, n: int) -> Precision:
    value = randn(g).square() + 0.3
    return Precision(Isotropic(value, n), value * torch.eye(n, dtype=torch.float64))


def _diagonal(g: torch.Generator, n: int) -> Precision:
    d = randn(g, n).square() + 0.1
    return Precision(Diagonal(d), torch.diag(d))


def _dense(g: torch.Generator, n: int) -> Precision:
    A = spd(g, n)
    return Precision(Dense(A), A)


def _kronecker(g: torch.Generator, n: int) -> Precision:
    A, B = spd(g, OUT), spd(g, IN)
    return Precision(KroneckerSum([(A, B)]), torch.kron(A, B))


def _shifted(g: torch.Generator, n: int) -> Precision:
    A, B = (
        spd(g, OUT),
        torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)),
    )  # singular, repeated
    delta = randn(g).square() + 0.1
    return Precision(
        KroneckerSum.shifted(A, B, delta), torch.kron(A, B) + delta * torch.eye(12, dtype=torch.float64)
    )


def _direct(g: torch.Generator, n: int) -> Precision:
    A, B = spd(g, OUT), spd(g, IN)
    eyes = torch.eye(OUT, dtype=torch.float64), torch.eye(IN, dtype=torch.float64)
    return Precision(KroneckerSum.direct(A, B), torch.kron(A, eyes[1]) + torch.kron(eyes[0], B))


def _two(g: torch.Generator, n: int) -> Precision:
    A1, B1, A2, B2 = spd(g, OUT), spd(g, IN), spd(g, OUT), spd(g, IN)
    return Precision(KroneckerSum([(A1, B1), (A2, B2)]), torch.kron(A1, B1) + torch.kron(A2, B2))


def _spectral(g: torch.Generator, n: int) -> Precision:
    QL, QR, d = orthogonal(g, OUT), orthogonal(g, IN), randn(g, OUT, IN).square() + 0.1
    Q = torch.kron(QL, QR)
    return Precision(SpectralKronecker(QL, QR, d), Q @ torch.diag(d.flatten()) @ Q.mT)


def _low_rank(g: torch.Generator, n: int) -> Precision:
    d, U = randn(g, n).square() + 0.1, randn(g, n, 2)
    return Precision(LowRankPlusDiag(d, U), torch.diag(d) + U @ U.mT)


def _updated(g: torch.Generator, n: int) -> Precision:
    """An update by a tensor of a Kronecker operator (of an isotropic one where D is 15)."""
    base = _shifted(g, n) if n == 12 else _isotropic(g, n)
    U = randn(g, n, 2)
    return Precision(base.operator.update(U), base.matrix + U @ U.mT)


def _dual(g: torch.Generator, n: int) -> Precision:
    """An update by features that are never multiplied out, scaled."""
    base = _diagonal(g, n)
    Phi = features("khatri_rao" if n == 12 else "block", int(torch.randint(2**20, (), generator=g)), N=2)
    U = Phi.rows.flatten(0, 1).mT
    return Precision(2.5 * base.operator.update(Phi.operator), 2.5 * (base.matrix + U @ U.mT))


def _core(g: torch.Generator, n: int) -> Precision:
    """An update by features with a core between them, scaled."""
    base = _diagonal(g, n)
    Phi = features("khatri_rao" if n == 12 else "block", int(torch.randint(2**20, (), generator=g)), N=2)
    U, C = Phi.rows.flatten(0, 1).mT, spd(g, 4)
    return Precision(2.5 * Woodbury(base.operator, Phi.operator, core=C), 2.5 * (base.matrix + U @ C @ U.mT))


def _singular_core(g: torch.Generator, n: int) -> Precision:
    """The same with a core that is indefinite and singular."""
    base = _isotropic(g, n)
    Phi = features("khatri_rao" if n == 12 else "block", int(torch.randint(2**20, (), generator=g)), N=2)
    U = Phi.rows.flatten(0, 1).mT
    V = orthogonal(g, 4) * torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64).sqrt()
    low = V[:, 1:2] * (0.3 * base.matrix[0, 0] / torch.linalg.matrix_norm(U, 2) ** 2).sqrt()
    C = V[:, :1] @ V[:, :1].mT - low @ low.mT
    C = (C + C.mT) / 2
    return Precision(Woodbury(base.operator, Phi.operator, core=C), base.matrix + U @ C @ U.mT)


def _downdated(g: torch.Generator, n: int) -> Precision:
    base = _isotropic(g, n)
    U = randn(g, n, 2)
    U = U * (0.4 / torch.linalg.matrix_norm(U, 2))
    return Precision(base.operator.downdate(U), base.matrix - U @ U.mT)


def _blocks(g: torch.Generator, n: int) -> Precision:
    parts = [_shifted(g, 12), _dense(g, 3)]
    matrix = torch.zeros(15, 15, dtype=torch.float64)
    for part, index in zip(parts, BLOCKS, strict=True):
        matrix[index[:, None], index] = part.matrix
    return Precision(BlockDiag([p.operator for p in parts], BLOCKS), matrix)


PRECISIONS: dict[str, Callable[[torch.Generator, int], Precision]] = {
    "isotropic": _isotropic,
    "diagonal": _diagonal,
    "dense": _dense,
    "kronecker": _kronecker,
    "shifted": _shifted,
    "direct": _direct,
    "two": _two,
    "spectral": _spectral,
    "low_rank": _low_rank,
    "updated": _updated,
    "dual": _dual,
    "core": _core,
    "singular_core": _singular_core,
    "downdated": _downdated,
    "blocks": _blocks,
}
KRONECKER_KINDS = ("kronecker", "shifted", "direct", "two", "spectral")
ANY_SIZE = (
    "isotropic",
    "diagonal",
    "dense",
    "low_rank",
    "updated",
    "dual",
    "core",
    "singular_core",
    "downdated",
)


def precision(kind: str, seed: int, size: int = 12) -> Precision:
    return PRECISIONS[kind](generator(seed), size)


PAIRS = [
    *(("khatri_rao", kind) for kind in (*ANY_SIZE, *KRONECKER_KINDS)),
    *(("dense", kind) for kind in (*ANY_SIZE, *KRONECKER_KINDS)),
    *(("combined", kind) for kind in (*ANY_SIZE, *KRONECKER_KINDS)),
    *(("block", kind) for kind in (*ANY_SIZE, "blocks")),
]
"""Every closed pair of feature kind and precision kind."""


def closed_pair(pair: tuple[str, str], seed: int, **shape: int) -> tuple[Features, Precision]:
    size = 15 if pair[0] == "block" else 12
    return features(pair[0], seed, **shape), precision(pair[1], seed + 1, size)


def tiny_chunks(monkeypatch: pytest.MonkeyPatch, budget: int = 100) -> None:
    """Temporaries of at most `budget` bytes: by default one sample at a time, with its channels cut."""
    monkeypatch.setattr(chunks, "BUDGET", budget)
    monkeypatch.setattr(chunks, "CEILING", budget)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Equal to `rtol` of the largest entry, in value, shape and dtype."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype
    scale = expected.abs().max() if expected.numel() else torch.zeros(())
    gap = (actual - expected).abs().max() if expected.numel() else torch.zeros(())
    assert bool(gap <= rtol * scale), f"relative difference {float(gap / scale):.1e}"
