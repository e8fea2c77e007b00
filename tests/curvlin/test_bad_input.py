"""Bad input is refused where it enters, in one line that names the argument; nothing half-built survives."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import kl_divergence

from curvlin import (
    BlockDiag,
    BlockFeatures,
    CombinedFeatures,
    Covariance,
    Dense,
    DenseFeatures,
    Diagonal,
    Gaussian,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    NotPositiveDefiniteError,
    SpectralKronecker,
    StaleFactorError,
    Woodbury,
)
from curvlin.testing import KINDS, Spec, make_case

f64 = torch.float64
I2, I3 = torch.eye(2, dtype=f64), torch.eye(3, dtype=f64)
ONES = torch.ones(3, dtype=f64)
NAN, INF = torch.tensor(float("nan"), dtype=f64), torch.tensor(float("inf"), dtype=f64)
INDEFINITE = torch.diag(torch.tensor([1.0, -0.5], dtype=f64))
SINGULAR = torch.diag(torch.tensor([1.0, 0.0], dtype=f64))
LOPSIDED = torch.tensor([[1.0, 0.5], [0.4, 1.0]], dtype=f64)
I4 = torch.eye(4, dtype=f64)
META = torch.empty(3, 3, dtype=f64, device="meta")


def batch(n: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.expand(n, *tensor.shape)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # not square
    "Dense not square": (lambda: Dense(torch.ones(2, 3)), ValueError, "matrix must be square"),
    "Kronecker not square": (
        lambda: KroneckerSum([(torch.ones(2, 3, dtype=f64), I2)]),
        ValueError,
        r"terms\[0\].left",
    ),
    "damped not square": (
        lambda: KroneckerSum.damped(I2, torch.ones(2, 3, dtype=f64), 1.0),
        ValueError,
        "B must be",
    ),
    "bases not square": (
        lambda: SpectralKronecker(torch.ones(2, 3, dtype=f64), I2, torch.ones(2, 2, dtype=f64)),
        ValueError,
        "must be square",
    ),
    "core not square": (
        lambda: Woodbury(Diagonal(ONES), torch.ones(3, 2, dtype=f64), core=torch.ones(2, 3, dtype=f64)),
        ValueError,
        "core",
    ),
    "Dense a vector": (lambda: Dense(ONES), ValueError, "matrix must have at least 2 dimensions"),
    # not symmetric
    "Dense not symmetric": (
        lambda: Dense(LOPSIDED),
        ValueError,
        "matrix must be symmetric, found asymmetry 1.0e-01",
    ),
    "Kronecker not symmetric": (
        lambda: KroneckerSum([(I2, LOPSIDED)]),
        ValueError,
        r"terms\[0\].right must be symm",
    ),
    "core not symmetric": (
        lambda: Woodbury(Diagonal(ONES), torch.ones(3, 2, dtype=f64), core=LOPSIDED),
        ValueError,
        "core must be symmetric",
    ),
    "bases not orthogonal": (
        lambda: SpectralKronecker(I2 * 1.001, I2, torch.ones(2, 2, dtype=f64)),
        ValueError,
        "orthogonal",
    ),
    "roots that are none": (
        lambda: KroneckerSum([(I2, I2)], roots=[(SINGULAR, None)]),
        ValueError,
        r"roots\[0\].left must satisfy",
    ),
    "roots of zero": (
        lambda: KroneckerSum([(I2, I2)], shift=1.0, roots=[(0 * I2, None)]),
        ValueError,
        r"roots\[0\].left must satisfy R\^T R = factor up to a positive scale, found",
    ),
    "roots of a negative matrix": (
        lambda: KroneckerSum([(-3 * I2, I2)], roots=[(I2, I2)]),
        ValueError,
        r"roots\[0\].left must satisfy",
    ),
    "roots of a traceless matrix": (
        lambda: KroneckerSum([(1e-20 * I2.flip(-1), I2)], roots=[(0 * I2, I2)]),
        ValueError,
        r"roots\[0\].left must satisfy",
    ),
    "one bad root of a batch": (
        lambda: KroneckerSum([(I2.expand(2, 2, 2), I2)], roots=[(torch.stack([I2, 0 * I2]), I2)]),
        ValueError,
        r"roots\[0\].left must satisfy",
    ),
    # NaN and Inf
    "Dense NaN": (lambda: Dense(NAN * I2), ValueError, "matrix must be finite"),
    "Dense Inf": (lambda: Dense(INF.expand(2, 2)), ValueError, "matrix must be finite"),
    "Diagonal NaN": (lambda: Diagonal(ONES * NAN), ValueError, "diagonal must be finite"),
    "Isotropic NaN": (lambda: Isotropic(float("nan"), 3), ValueError, "value must be finite"),
    "Isotropic Inf": (lambda: Isotropic(INF, 3), ValueError, "value must be finite"),
    "shift NaN": (lambda: KroneckerSum([(I2, I2)], shift=NAN), ValueError, "shift must be finite"),
    "eigenvalues Inf": (
        lambda: SpectralKronecker(I2, I2, INF.expand(2, 2)),
        ValueError,
        "eigenvalues must be finite",
    ),
    "U NaN": (
        lambda: LowRankPlusDiag(ONES, NAN * torch.ones(3, 1, dtype=f64)),
        ValueError,
        "U must be finite",
    ),
    # integers and other types
    "Dense integers": (
        lambda: Dense(torch.eye(2, dtype=torch.long)),
        TypeError,
        "matrix must have a floating dtype",
    ),
    "Diagonal integers": (
        lambda: Diagonal(torch.arange(1, 4)),
        TypeError,
        "diagonal must have a floating dtype",
    ),
    "Isotropic integers": (
        lambda: Isotropic(torch.tensor(1), 3),
        TypeError,
        "value must have a floating dtype",
    ),
    "U integers": (
        lambda: LowRankPlusDiag(ONES, torch.ones(3, 1).long()),
        TypeError,
        "U must have a floating dtype",
    ),
    "a list": (lambda: Dense([[1.0]]), TypeError, "matrix must be a torch.Tensor, found list"),  # type: ignore[arg-type]
    "complex": (
        lambda: Diagonal(ONES.to(torch.complex128)),
        TypeError,
        "diagonal must have a floating dtype",
    ),
    "blocks of tensors": (lambda: BlockDiag([I2]), TypeError, r"blocks\[0\] must be a PrecisionOperator"),  # type: ignore[list-item]
    "base a tensor": (lambda: Woodbury(I3, torch.ones(3, 1, dtype=f64)), TypeError, "base must be"),  # type: ignore[arg-type]
    # sizes
    "no size": (lambda: Isotropic(1.0, 0), ValueError, "size must be a positive integer"),
    "negative size": (lambda: Isotropic(1.0, -3), ValueError, "size must be a positive integer"),
    "fractional size": (lambda: Isotropic(1.0, 2.5), TypeError, "size must be an integer, found float 2.5"),
    "size that is a matrix": (
        lambda: Isotropic(1.0, torch.ones(2, 1)),
        TypeError,
        "size must be an integer, found Tensor",
    ),
    "zero rows, Dense": (lambda: Dense(torch.ones(0, 0)), ValueError, "matrix must have at least one row"),
    "zero rows, Diagonal": (
        lambda: Diagonal(torch.ones(0)),
        ValueError,
        "diagonal must have at least one entry",
    ),
    "zero rows, Kronecker": (
        lambda: KroneckerSum([(torch.ones(0, 0), torch.eye(2))]),
        ValueError,
        r"terms\[0\].left must have at least one row",
    ),
    "zero columns": (lambda: LowRankPlusDiag(ONES, torch.ones(3, 0, dtype=f64)), ValueError, "U must have"),
    "U too long": (
        lambda: LowRankPlusDiag(ONES, torch.ones(4, 1, dtype=f64)),
        ValueError,
        r"U must have shape \(..., 3, k\)",
    ),
    "core of another size than the rows": (
        lambda: Woodbury(Diagonal(ONES), DenseFeatures(torch.ones(3, 1, 3, dtype=f64)), core=I2),
        ValueError,
        "core must have 3 rows",
    ),
    "weights of other rows": (
        lambda: CombinedFeatures(
            torch.ones(1, 1, 2, dtype=f64), DenseFeatures(torch.ones(3, 1, 3, dtype=f64))
        ),
        ValueError,
        "one for each row",
    ),
    "weights of another dtype": (
        lambda: CombinedFeatures(torch.ones(1, 1, 3), DenseFeatures(torch.ones(3, 1, 3, dtype=f64))),
        TypeError,
        "weights",
    ),
    "rows that are no features": (
        lambda: CombinedFeatures(torch.ones(1, 1, 3), torch.ones(3, 1, 3)),  # type: ignore[arg-type]
        TypeError,
        "rows must be a FeatureOperator",
    ),
    "core of another size": (
        lambda: Woodbury(Diagonal(ONES), torch.ones(3, 1, dtype=f64), core=I2),
        ValueError,
        "core must",
    ),
    "factors of two sizes": (
        lambda: KroneckerSum([(I2, I2), (I3, I2)]),
        ValueError,
        "left factors must have equal",
    ),
    "eigenvalues of another shape": (
        lambda: SpectralKronecker(I2, I3, torch.ones(3, 2, dtype=f64)),
        ValueError,
        "eigenvalues",
    ),
    "sizes of zero": (
        lambda: KroneckerSum([(I2, None)], sizes=(2, 0)),
        ValueError,
        r"sizes\[1\] must be a positive integer, found 0",
    ),
    "sizes below zero": (
        lambda: KroneckerSum([(I2, None)], sizes=(2, -1)),
        ValueError,
        r"sizes\[1\] must be a positive integer, found -1",
    ),
    "one size": (
        lambda: KroneckerSum([(I2, None)], sizes=(2,)),  # type: ignore[arg-type]
        ValueError,
        r"sizes must be a pair \(a, b\), found \(2,\)",
    ),
    "sizes to project onto": (
        lambda: Dense(I4).project(KroneckerSum, sizes=(-2, -2)),
        ValueError,
        r"sizes\[0\] must be a positive integer, found -2",
    ),
    "sizes unknown": (
        lambda: KroneckerSum([(I2, None)]),
        ValueError,
        "right factors are all identities; give sizes",
    ),
    # batches that do not broadcast
    "batches, Kronecker": (
        lambda: KroneckerSum([(batch(3, I2), batch(2, I2))]),
        ValueError,
        r"terms\[0\].right must have a batch shape that broadcasts with \(3,\), found \(2,\)",
    ),
    "batches, second term": (
        lambda: KroneckerSum([(batch(3, I2), I2), (I2, batch(2, I2))]),
        ValueError,
        r"terms\[1\].right must have a batch shape",
    ),
    "batches, shift": (
        lambda: KroneckerSum([(batch(3, I2), I2)], torch.ones(2, dtype=f64)),
        ValueError,
        "shift",
    ),
    "batches, roots": (
        lambda: KroneckerSum([(batch(3, I2), I2)], roots=[(None, batch(2, I2))]),
        ValueError,
        r"roots\[0\].right must have a batch shape",
    ),
    "batches, damped": (
        lambda: KroneckerSum.damped(batch(3, I2), I2, torch.ones(2, dtype=f64)),
        ValueError,
        "delta must have a batch shape",
    ),
    "batches, bases": (
        lambda: SpectralKronecker(batch(3, I2), batch(2, I2), I2),
        ValueError,
        "QR must have a batch shape",
    ),
    "batches, eigenvalues": (
        lambda: SpectralKronecker(I2, batch(3, I2), batch(2, I2)),
        ValueError,
        "eigenvalues must have a batch shape",
    ),
    "batches, other eigenvalues": (
        lambda: SpectralKronecker(I2, batch(3, I2), I2).with_eigenvalues(batch(2, I2)),
        ValueError,
        "eigenvalues must have a batch shape",
    ),
    "batches, blocks": (
        lambda: BlockDiag([Dense(batch(3, I2)), Dense(batch(2, I2))]),
        ValueError,
        r"blocks\[1\] must have a batch shape",
    ),
    "batches, U": (
        lambda: LowRankPlusDiag(batch(3, ONES), batch(2, I3)),
        ValueError,
        "U must have a batch shape",
    ),
    "batches, core": (
        lambda: Woodbury(Diagonal(ONES), batch(3, I3), core=batch(2, I3)),
        ValueError,
        "core must have a batch shape",
    ),
    "batches, features as U": (
        lambda: Woodbury(Dense(batch(3, I2)), DenseFeatures(batch(2, I2[None]))),
        ValueError,
        "U must have a batch shape",
    ),
    "batches, Khatri-Rao": (
        lambda: KhatriRaoFeatures(batch(3, I2[None, None]), batch(2, I2[None])),
        ValueError,
        "right must have a batch shape",
    ),
    "batches, parts": (
        lambda: BlockFeatures([DenseFeatures(batch(3, I2[None])), DenseFeatures(batch(2, I2[None]))]),
        ValueError,
        r"parts\[1\] must have a batch shape",
    ),
    "batches, mean": (
        lambda: Gaussian(batch(2, ONES), Dense(batch(3, I3))),
        ValueError,
        "mean must have a batch shape",
    ),
    # dtypes and devices
    "two dtypes, Kronecker": (
        lambda: KroneckerSum([(I2, I2.float())]),
        TypeError,
        r"terms\[0\].right must have dtype",
    ),
    "two dtypes, U": (
        lambda: LowRankPlusDiag(ONES, torch.ones(3, 1)),
        TypeError,
        "U must have dtype torch.float64",
    ),
    "two dtypes, blocks": (
        lambda: BlockDiag([Dense(I2), Dense(I2.float())]),
        TypeError,
        r"blocks\[1\] must have dtype",
    ),
    "two dtypes, shift": (
        lambda: KroneckerSum([(I2, I2)], torch.ones(())),
        TypeError,
        "shift must have dtype",
    ),
    "two dtypes, eigenvalues": (lambda: SpectralKronecker(I2, I2, torch.ones(2, 2)), TypeError, "dtype"),
    "two devices, Kronecker": (
        lambda: KroneckerSum([(I2, META)]),
        ValueError,
        r"terms\[0\].right must be on cpu",
    ),
    "two devices, U": (lambda: LowRankPlusDiag(ONES, META), ValueError, "U must be on cpu"),
    "two devices, core": (
        lambda: Woodbury(Diagonal(ONES), torch.ones(3, 3, dtype=f64), core=META),
        ValueError,
        "core must be on cpu",
    ),
    # blocks
    "no blocks": (lambda: BlockDiag([]), ValueError, "blocks must hold at least one operator"),
    "overlapping indices": (
        lambda: BlockDiag([Dense(I2), Dense(I2)], indices=[torch.tensor([0, 1]), torch.tensor([1, 2])]),
        ValueError,
        "indices must name each of the 4 coordinates exactly once",
    ),
    "repeated index": (
        lambda: BlockDiag([Dense(I2)], indices=[torch.tensor([0, 0])]),
        ValueError,
        "indices must name each",
    ),
    "gap in the indices": (
        lambda: BlockDiag([Dense(I2)], indices=[torch.tensor([0, 2])]),
        ValueError,
        "indices must name each",
    ),
    "empty block": (
        lambda: BlockDiag([Dense(I2)], indices=[torch.tensor([0, 1]), torch.tensor([], dtype=torch.long)]),
        ValueError,
        r"indices\[1\] must be a non-empty vector",
    ),
    "indices of other sizes": (
        lambda: BlockDiag([Dense(I2), Dense(I3)], indices=[torch.arange(3), torch.arange(3, 5)]),
        ValueError,
        r"indices must have the sizes of the blocks \(2, 3\), found \(3, 2\)",
    ),
    "floating indices": (
        lambda: BlockDiag([Dense(I2)], indices=[torch.tensor([0.0, 1.0])]),
        TypeError,
        "integers",
    ),
    # structure
    "no terms": (lambda: KroneckerSum([]), ValueError, "terms must hold one or two pairs"),
    "three terms": (lambda: KroneckerSum([(I2, I2)] * 3), NotClosedError, "one or two terms, found 3"),
    "two terms and a shift": (
        lambda: KroneckerSum([(I2, I2)] * 2, shift=1.0),
        NotClosedError,
        "joint diagonalisation",
    ),
    "a triple": (lambda: KroneckerSum([(I2, I2, I2)]), ValueError, r"terms\[0\] must be a pair"),  # type: ignore[list-item]
    "only identities": (lambda: KroneckerSum([(None, None)]), ValueError, "at least one matrix"),
    "roots of one term of two": (
        lambda: KroneckerSum([(I2, I2)] * 2, roots=[(I2, I2)]),
        ValueError,
        "roots must hold one pair per term",
    ),
    "covariance of a lopsided matrix": (
        lambda: Covariance.of(LOPSIDED),
        ValueError,
        "matrix must be symmetric",
    ),
    "covariance of a tensor": (lambda: Covariance(I2), TypeError, "operator must be a PrecisionOperator"),  # type: ignore[arg-type]
}


P3 = Dense(torch.stack([I3] * 3))
"""A batch of three, for arguments with a batch of two."""

REFUSED |= {
    # what an operation is given
    "expand": (
        lambda: P3.expand((2,)),
        ValueError,
        r"batch_shape must be one that \(3,\) expands to, found \(2,\)",
    ),
    "X": (lambda: P3 @ batch(2, I3), ValueError, "X must have a batch shape that broadcasts"),
    "X from the left": (lambda: batch(2, I3) @ P3, ValueError, "X must have a batch shape"),
    "solve": (lambda: P3.solve(batch(2, I3)), ValueError, "X must have a batch shape"),
    "inv_quad": (lambda: P3.inv_quad(batch(2, ONES)), ValueError, "x must have a batch shape"),
    "unwhiten": (lambda: P3.unwhiten(batch(2, ONES)), ValueError, "z must have a batch shape"),
    "sum": (lambda: P3 + Dense(batch(2, I3)), ValueError, r"the right operand of \+ must have a batch shape"),
    "scale": (
        lambda: P3 * torch.ones(2, dtype=f64),
        ValueError,
        "the scale of an operator must have a batch shape",
    ),
    "trace_solve": (lambda: P3.trace_solve(Dense(batch(2, I3))), ValueError, "Q must have a batch shape"),
    "rows": (lambda: P3.inv_congruence(batch(2, I3)), ValueError, "Phi must have a batch shape"),
    "other rows": (
        lambda: Dense(I3).inv_congruence(batch(3, I3), batch(2, I3)),
        ValueError,
        "Psi must have a batch shape",
    ),
    "features": (
        lambda: P3.inv_congruence(DenseFeatures(batch(2, I3[None]))),
        ValueError,
        "Phi must have a batch shape",
    ),
    "other features": (
        lambda: Dense(I3).inv_congruence(
            DenseFeatures(batch(3, I3[None])), DenseFeatures(batch(2, I3[None]))
        ),
        ValueError,
        "Psi must have a batch shape",
    ),
    "update": (lambda: P3.update(batch(2, I3)), ValueError, "U must have a batch shape"),
    "product of features": (
        lambda: DenseFeatures(batch(3, I3[None])) @ batch(2, I3),
        ValueError,
        "v must have a batch shape",
    ),
    "transposed features": (
        lambda: DenseFeatures(batch(3, I3[None])).T @ batch(2, I3[None]),
        ValueError,
        "u must have a batch shape",
    ),
    "mixed features": (
        lambda: batch(2, I3[None]) @ DenseFeatures(batch(3, I3[None])),
        ValueError,
        "S must have a batch shape",
    ),
    "scaled features": (
        lambda: DenseFeatures(batch(3, I3[None])) * torch.ones(2, dtype=f64),
        ValueError,
        "the scale of features must have a batch shape",
    ),
    "gram": (
        lambda: DenseFeatures(batch(3, I3[None])).gram(DenseFeatures(batch(2, I3[None]))),
        ValueError,
        "Psi must have a batch shape",
    ),
    "pushed forward": (
        lambda: Gaussian(ONES, P3).push_forward(batch(2, I3)),
        ValueError,
        "Phi must have a batch shape",
    ),
    "pushed forward by features": (
        lambda: Gaussian(ONES, P3).push_forward(DenseFeatures(batch(2, I3[None]))),
        ValueError,
        "Phi must have a batch shape",
    ),
    "offset": (
        lambda: Gaussian(ONES, P3).push_forward(I3, offset=batch(2, ONES)),
        ValueError,
        r"offset must have shape \(..., 3, 3\), found \(2, 3\)",
    ),
    "center": (
        lambda: Gaussian(ONES, P3).push_forward(I3, center=batch(2, ONES)),
        ValueError,
        r"center must have shape \(..., 3, 3\), found \(2, 3\)",
    ),
    "observations": (
        lambda: Gaussian(ONES, P3).condition(I3, batch(2, ONES), 1.0),
        ValueError,
        r"y must have shape \(..., 3, 3\), found \(2, 3\)",
    ),
    "divergence": (
        lambda: kl_divergence(Gaussian(ONES, P3), Gaussian(ONES, Dense(batch(2, I3)))),
        ValueError,
        "q must have a batch shape",
    ),
    # arguments of other kinds
    "a number as X": (lambda: Dense(I2) @ ONES[0], ValueError, r"X must have 2 rows.*; found shape \(\)"),
    "a number to solve for": (lambda: Dense(I2).solve(ONES[0]), ValueError, "X must have 2 rows"),
    "a number as x": (lambda: Dense(I2).inv_quad(ONES[0]), ValueError, r"x must have shape \(..., 2\)"),
    "no chunk": (
        lambda: Dense(I2).inv_congruence(DenseFeatures(I2[None]), chunk=0),
        ValueError,
        "chunk must be a positive integer, found 0",
    ),
    "negative chunk": (
        lambda: Dense(I2).inv_congruence_diagonal(DenseFeatures(I2[None]), chunk=-1),
        ValueError,
        "chunk must be a positive integer, found -1",
    ),
    "negative damping": (
        lambda: KroneckerSum.damped(I2, I2, -1.0),
        ValueError,
        r"delta must be non-negative, found -1.000e\+00",
    ),
    "NaN damping": (lambda: KroneckerSum.damped(I2, I2, NAN), ValueError, "delta must be finite"),
    "damped and not symmetric": (
        lambda: KroneckerSum.damped(I2, LOPSIDED, 1.0),
        ValueError,
        "B must be symmetric",
    ),
    "one damped root": (
        lambda: KroneckerSum.damped(I2, I2, 1.0, roots=(I2,)),  # type: ignore[arg-type]
        ValueError,
        r"roots must be a pair \(left, right\), found 1 entries",
    ),
    "damped root of another size": (
        lambda: KroneckerSum.damped(I2, I2, 1.0, roots=(None, I3)),
        ValueError,
        r"roots.right must have 2 columns",
    ),
    "a seed": (
        lambda: Dense(I2).sample(generator=3),  # type: ignore[arg-type]
        TypeError,
        "generator must be a torch.Generator or None, found int",
    ),
    "a seed for a covariance": (
        lambda: Covariance(Dense(I2)).sample(generator=3),  # type: ignore[arg-type]
        TypeError,
        "generator must be a torch.Generator",
    ),
    "a seed for a Gaussian": (
        lambda: Gaussian(ONES[:2], Dense(I2)).rsample(generator=3),  # type: ignore[arg-type]
        TypeError,
        "generator must be a torch.Generator",
    ),
    "a number of samples": (
        lambda: Dense(I2).sample(3),  # type: ignore[arg-type]
        ValueError,
        "sample_shape must be a tuple of sizes, found 3",
    ),
    "fewer than no samples": (
        lambda: Dense(I2).sample((-1,)),
        ValueError,
        r"sample_shape must be a tuple of sizes, found \(-1,\)",
    ),
    "no index": (
        lambda: Dense(I2).marginal(None),  # type: ignore[arg-type]
        TypeError,
        "index must hold integers, found NoneType",
    ),
    "ragged index": (
        lambda: Dense(I2).conditional([[0], [0, 1]]),  # type: ignore[list-item]
        TypeError,
        "index must hold integers, found list",
    ),
    "text as index": (
        lambda: Dense(I2).marginal("01"),  # type: ignore[arg-type]
        TypeError,
        "index must hold integers, found str",
    ),
    "nothing as features": (
        lambda: Dense(I2).inv_congruence(None),  # type: ignore[arg-type]
        TypeError,
        r"Phi must be a FeatureOperator \(or both tensors\), found NoneType",
    ),
    "a name to project onto": (
        lambda: Dense(I2).project("Diagonal"),  # type: ignore[arg-type]
        NotClosedError,
        "no projection onto 'Diagonal'; choose Isotropic",
    ),
    "complex index": (
        lambda: Dense(I2).marginal(torch.zeros(1, dtype=torch.complex64)),
        TypeError,
        "index must hold integers, found torch.complex64",
    ),
    "rows of a list": (
        lambda: Gaussian(ONES, Dense(I3)).condition([[1.0, 0.0, 0.0]], ONES[:1], 1.0),  # type: ignore[arg-type]
        TypeError,
        "Phi must be a torch.Tensor, found list",
    ),
    # dtypes without room for the entries
    "to integers": (
        lambda: Dense(I2).to(torch.int64),
        TypeError,
        "a Dense must have a floating dtype, found torch.int64",
    ),
    "to complex": (
        lambda: Covariance(Dense(I2)).to(torch.complex64),
        TypeError,
        "must have a floating dtype",
    ),
    "to a narrower dtype": (
        lambda: Dense(1e300 * I2).to(torch.float32),
        ValueError,
        "entries that fit torch.float32, found an overflow",
    ),
    "scale beyond float64": (
        lambda: 1e300 * KroneckerSum([(1e300 * I2, I2)]),
        ValueError,
        "the scaled operator must be finite",
    ),
    "scale of a spectrum": (
        lambda: 1e300 * SpectralKronecker(I2, I2, torch.full((2, 2), 1e300, dtype=f64)),
        ValueError,
        "the scaled operator must be finite",
    ),
    "scale of a matrix": (
        lambda: 1e300 * Dense(1e300 * I2),
        ValueError,
        "the scaled operator must be finite",
    ),
    "scale of an update": (
        lambda: 1e300 * (1e300 * Woodbury(Dense(1e-300 * I2), I2)),
        ValueError,
        "the scaled operator must be finite",
    ),
    "scale beyond float32": (
        lambda: Diagonal(torch.ones(2)) * torch.tensor(1e300, dtype=f64),
        ValueError,
        "the scale of an operator must be finite",
    ),
    "scale below float32": (
        lambda: Diagonal(torch.ones(2)) * torch.tensor(1e-300, dtype=f64),
        ValueError,
        "the scale of an operator must be positive",
    ),
    "sum of spectra": (
        lambda: (
            SpectralKronecker(I2, I2, torch.full((2, 2), 1.7e308, dtype=f64))
            + Isotropic(1.7e308 * NAN.new_ones(()), 4)
        ),
        ValueError,
        "eigenvalues must be finite",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_constructor_refuses(what: str) -> None:
    call, expected, message = REFUSED[what]
    with pytest.raises(expected) as caught:
        call()
    assert re.search(message, str(caught.value)), f"{message!r} is not in {str(caught.value)!r}"
    assert "\n" not in str(caught.value)


# -- definiteness -------------------------------------------------------------------------------------------------

NOT_PD: dict[str, Callable[[], Any]] = {
    "Isotropic zero": lambda: Isotropic(torch.zeros((), dtype=f64), 3),
    "Isotropic negative": lambda: Isotropic(-torch.ones((), dtype=f64), 3),
    "Diagonal singular": lambda: Diagonal(torch.tensor([1.0, 0.0], dtype=f64)),
    "Diagonal indefinite": lambda: Diagonal(torch.tensor([1.0, -1.0], dtype=f64)),
    "Dense singular": lambda: Dense(SINGULAR),
    "Dense indefinite": lambda: Dense(INDEFINITE),
    "Dense zero": lambda: Dense(torch.zeros(2, 2, dtype=f64)),
    "Kronecker singular": lambda: KroneckerSum([(SINGULAR, I2)]),
    "Kronecker indefinite": lambda: KroneckerSum([(I2, INDEFINITE)]),
    "shifted, shift zero": lambda: KroneckerSum.shifted(SINGULAR, I2, torch.zeros((), dtype=f64)),
    "shifted, shift negative": lambda: KroneckerSum.shifted(I2, I2, torch.tensor(-2.0, dtype=f64)),
    "two terms, shared null direction": lambda: KroneckerSum([(SINGULAR, I2), (SINGULAR, I2)]),
    "two terms, null directions that meet": lambda: KroneckerSum([(SINGULAR, I2), (I2, SINGULAR)]),
    "direct sum of singular": lambda: KroneckerSum.direct(SINGULAR, SINGULAR),
    "Spectral singular": lambda: SpectralKronecker(I2, I2, torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=f64)),
    "one bad block": lambda: BlockDiag([Dense(I2), Diagonal(torch.tensor([1.0, -1.0], dtype=f64))]),
    "one bad element of a batch": lambda: Dense(torch.stack([I2, INDEFINITE])),
    "low rank over a singular diagonal": lambda: LowRankPlusDiag(
        torch.tensor([1.0, 0.0, 1.0], dtype=f64), torch.tensor([[1.0], [0.0], [0.0]], dtype=f64)
    ),
    "downdate too large": lambda: Diagonal(ONES).downdate(2 * torch.ones(3, 1, dtype=f64)),
    "downdate exactly singular": lambda: Diagonal(ONES).downdate(torch.eye(3, 1, dtype=f64)),
    "negative core": lambda: Woodbury(
        Diagonal(ONES), torch.eye(3, 1, dtype=f64), core=-2 * torch.ones(1, 1, dtype=f64)
    ),
}


@pytest.mark.parametrize("what", NOT_PD)
@pytest.mark.parametrize(
    "method", ["solve", "logdet", "inv_quad", "inverse_diagonal", "unwhiten", "sample", "factor"]
)
def test_what_needs_an_inverse_refuses(what: str, method: str) -> None:
    """It may be built, multiplied and scaled; the failure has a name, a value and a mend."""
    P = NOT_PD[what]()
    x = torch.ones(P.size, dtype=f64)
    assert torch.equal((2.0 * P) @ x, 2.0 * (P @ x))
    arguments = (x,) if method in ("solve", "inv_quad", "unwhiten") else ()
    with pytest.raises(NotPositiveDefiniteError) as caught:
        getattr(P, method)(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "is not positive definite: found eigenvalue or pivot" in message
    assert caught.value.value <= 1e-12
    assert caught.value.where.split(".")[0] in (
        type(P).__name__,
        "Dense",
        "KroneckerSum",
        "Diagonal",
        "Woodbury",
    )


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_roots_count_up_to_scale(scale: float) -> None:
    R = torch.tensor([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]], dtype=f64)
    expected = KroneckerSum([(R.mT @ R, I2)]).logdet()
    torch.testing.assert_close(KroneckerSum([(R.mT @ R, I2)], roots=[(scale * R, I2)]).logdet(), expected)


def test_a_root_of_a_zero_factor_is_zero() -> None:
    P = KroneckerSum([(0 * I2, I2)], shift=3.0, roots=[(0 * I2, None)])
    assert float(P.logdet()) == pytest.approx(4 * math.log(3.0))


def test_the_offending_block_is_named() -> None:
    P = BlockDiag([Dense(I2), Diagonal(torch.tensor([1.0, -1.0], dtype=f64))])
    with pytest.raises(NotPositiveDefiniteError, match=r"BlockDiag.blocks\[1\].Diagonal") as caught:
        P.logdet()
    assert caught.value.value == -1.0


@pytest.mark.parametrize(
    ("make", "smallest"),
    [
        (lambda s: Dense(s * INDEFINITE), -0.5),
        (lambda s: Diagonal(s * torch.tensor([1.0, -0.5], dtype=f64)), -0.5),
    ],
    ids=["Dense", "Diagonal"],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_offending_eigenvalue_is_in_the_units_of_the_operator(
    make: Any, smallest: float, scale: float
) -> None:
    with pytest.raises(NotPositiveDefiniteError) as caught:
        make(scale).logdet()
    assert caught.value.value == pytest.approx(smallest * scale, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_suggested_damping_mends(scale: float) -> None:
    """It is relative to the largest eigenvalue, so it works at any scale."""
    P = Dense(scale * INDEFINITE)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        P.logdet()
    damping = caught.value.suggested_damping
    assert damping is not None
    largest = torch.tensor(damping * scale, dtype=f64)
    assert bool((P + Isotropic(largest, 2)).logdet().isfinite())


def test_a_semidefinite_matrix_is_singular_by_structure_not_by_luck() -> None:
    """Rounding leaves a rank-deficient Gram matrix with tiny eigenvalues of either sign; both count as zero."""
    for seed in range(20):
        X = torch.randn(3, 6, dtype=f64, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(NotPositiveDefiniteError):
            Dense(X.mT @ X).logdet()
        with pytest.raises(NotPositiveDefiniteError):
            KroneckerSum([(X.mT @ X, I2)]).logdet()
        assert bool(KroneckerSum.shifted(X.mT @ X, I2, 1e-3).logdet().isfinite())


# -- batches of nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_may_be_empty(kind: str) -> None:
    """It has no element that could be singular, not symmetric or no root."""
    case = make_case(kind, Spec(size=6, batch=(2,), seed=1))
    P = case.rebuilt([t[:0] for t in case.tensors])
    P = P._map(lambda t, _: t.clone().requires_grad_())
    x = torch.ones(6, dtype=f64)
    vectors = (
        P @ x,
        P.solve(x),
        P.sample(),
        P.whiten(x),
        P.root_matvec(x),
        P.diagonal(),
        P.inverse_diagonal(),
    )
    for answer in vectors:
        assert answer.shape == (0, 6)
        answer.sum().backward()
    for number in (P.logdet(), P.inv_quad(x), P.trace_solve(Isotropic(x[0], 6)), Gaussian(x, P).log_prob(x)):
        assert number.shape == (0,)
        number.sum().backward()
    for part in (P.marginal([1, 3]), P.conditional([0, 2]), P.factor().marginal([1, 3]), 2.0 * P):
        assert part.batch_shape == (0,)
    assert P.inv_congruence(torch.ones(4, 6, dtype=f64)).shape == (0, 4, 4)
    assert P.to_dense().shape == (0, 6, 6)
    assert P.allclose(P)


# -- factors that went stale --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_is_stale_after_an_edit_in_place(kind: str) -> None:
    case = make_case(kind, Spec(size=6, seed=1))
    kept = case.operator.factor()
    x = torch.ones(6, dtype=f64)
    kept.solve(x)
    tensor = next(kept._tensors())[0]
    tensor.mul_(1.0)
    for ask in (lambda: kept.solve(x), kept.logdet, kept.sample, kept.inverse_diagonal):
        with pytest.raises(
            StaleFactorError, match=r"changed in place after factor\(\); call factor\(\) again"
        ):
            ask()
    torch.testing.assert_close(kept.factor().solve(x), case.operator.solve(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_in_another_dtype_is_stale_after_an_edit_of_the_original(kind: str) -> None:
    """It answers from the tensors that were factorised, which are still those of P."""
    P = make_case(kind, Spec(size=6, seed=1)).operator
    kept = P.factor(torch.float32)
    kept.solve(torch.ones(6))
    next(P._tensors())[0].mul_(2.0)
    for ask in (lambda: kept.solve(torch.ones(6)), kept.logdet, kept.inverse_diagonal):
        with pytest.raises(StaleFactorError):
            ask()


def test_a_factor_of_many_columns_in_a_wider_dtype_goes_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large U is widened where it is used, so the factor refers to the narrow one."""
    monkeypatch.setattr("curvlin.precision.low_rank.ALWAYS_ORTHONORMAL", 0)
    U = torch.ones(6, 2)
    kept = LowRankPlusDiag(torch.ones(6), U).factor(f64)
    x = torch.ones(6, dtype=f64)
    kept.solve(x)
    U.mul_(2.0)
    with pytest.raises(StaleFactorError):
        kept.solve(x)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda obj: pickle.loads(pickle.dumps(obj)),
    "torch.save": lambda obj: _saved_and_loaded(obj),
}


def _saved_and_loaded(obj: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_factored_operator_answers_like_it(kind: str, how: str) -> None:
    """The count of edits in place, by which a factor knows that it is stale, does not travel with a tensor."""
    P = make_case(kind, Spec(size=6, seed=1)).operator
    tensor = next(P._tensors())[0]
    tensor.mul_(1.0)
    kept = P.factor()
    x = torch.ones(6, dtype=f64)
    Q = COPIES[how](kept)
    assert type(Q) is type(P)
    assert torch.equal(Q.solve(x), kept.solve(x))
    for made in (Covariance(kept), Gaussian(x, kept)):
        copied = COPIES[how](made)
        covariance = copied.covariance if isinstance(copied, Gaussian) else copied
        assert torch.equal(covariance @ x, kept.solve(x))


def test_an_edited_copy_of_a_factored_operator_is_not_answered_from_its_past() -> None:
    P = Dense(2 * I2)
    P.matrix.mul_(1.0).mul_(1.0)
    Q = copy.deepcopy(P.factor())
    Q.matrix.mul_(4.0)
    assert float(Q.logdet()) == pytest.approx(2 * math.log(8.0))


def test_factors_of_inference_tensors_go_stale_too() -> None:
    """Inference tensors do not count their edits."""
    with torch.inference_mode():
        P = Dense(2 * I2).factor()
        assert float(P.logdet()) == pytest.approx(2 * math.log(2.0))
        P.matrix.mul_(4.0)
        with pytest.raises(StaleFactorError):
            P.logdet()
        assert float(P.factor().logdet()) == pytest.approx(2 * math.log(8.0))


def test_partitions_are_equal_across_processes() -> None:
    """Their hash is part of what is pickled, and Python salts the hashes of bytes."""
    hashes = "import curvlin.index as i; print(hash(i.IndexSet([[0, 2], [1]])))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", hashes],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_what_is_made_from_a_factored_operator_is_not_factored() -> None:
    P = Dense(2 * I2).factor()
    assert "_kept" in P.__dict__
    for made in (2.0 * P, P + Isotropic(torch.ones((), dtype=f64), 2), P.to(torch.float32), P.detach()):
        assert "_kept" not in made.__dict__
    assert float((2.0 * P).logdet()) == pytest.approx(float(torch.tensor(16.0).log()))


# -- other refusals -----------------------------------------------------------------------------------------------


def test_dense_results_are_limited() -> None:
    """A marginal with no structure is dense; above `max_size` rows it is refused, not formed."""
    case = make_case("kronecker_shifted", Spec(size=36))
    index = [0, 7, 14]
    with pytest.raises(NotClosedError, match="max_size is 2"):
        case.operator.marginal(index, max_size=2)
    with pytest.raises(NotClosedError, match="max_size is 2"):
        case.operator.conditional(index, max_size=2)
    assert case.operator.marginal(index, max_size=3).size == 3


def test_operators_are_not_compared_by_equality() -> None:
    P = Dense(I2)
    assert P.allclose(Dense(I2.clone()))
    assert not P.allclose(Dense(I2 * 1.001))
    assert Dense(I2.clone()) != P
    with pytest.raises(ValueError, match="rows"):
        P.allclose(Dense(I3))


def test_numpy_leaves_products_to_the_operator() -> None:
    import numpy as np

    with pytest.raises(TypeError):
        np.ones((2, 2)) * Dense(I2)  # not an object array


def test_operators_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Dense(I2).matrix = I2  # type: ignore[misc]
