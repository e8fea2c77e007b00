"""Operators of linear_operator read as ours: equal entries, the structure kept, everything else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from interop_cases import F64, KINDS, MEANINGS, close, dense, positive, randn, spd
from linear_operator import operators as theirs
from linear_operator.operators import LinearOperator

from curvlin import (
    BlockDiag,
    Covariance,
    Dense,
    Diagonal,
    Isotropic,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    PrecisionOperator,
    Woodbury,
)
from curvlin.interop.ingestion import from_linear_operator

Batch = tuple[int, ...]
Make = Callable[[Batch], LinearOperator]


def kron(b: Batch, seed: int = 1) -> LinearOperator:
    return theirs.KroneckerProductLinearOperator(
        theirs.DenseLinearOperator(spd(seed, 3, b)), theirs.DenseLinearOperator(spd(seed + 1, 4, b))
    )


def diag(b: Batch) -> LinearOperator:
    return theirs.DiagLinearOperator(positive(5, *b, 12))


def constant(b: Batch) -> LinearOperator:
    return theirs.ConstantDiagLinearOperator(positive(6, *b, 1), 12)


def root(b: Batch) -> LinearOperator:
    return theirs.LowRankRootLinearOperator(theirs.DenseLinearOperator(randn(7, *b, 12, 2)))


def blocks(b: Batch) -> LinearOperator:
    return theirs.DenseLinearOperator(spd(8, 3, (*b, 4)))


STRUCTURES: dict[str, tuple[Make, type[PrecisionOperator]]] = {
    "identity": (lambda b: theirs.IdentityLinearOperator(12, torch.Size(b), dtype=F64), Isotropic),
    "constant diagonal": (constant, Isotropic),
    "diagonal": (diag, Diagonal),
    "Kronecker diagonal": (
        lambda b: theirs.KroneckerProductDiagLinearOperator(
            theirs.DiagLinearOperator(positive(1, *b, 3)), theirs.DiagLinearOperator(positive(2, *b, 4))
        ),
        Diagonal,
    ),
    "dense": (lambda b: theirs.DenseLinearOperator(spd(1, 12, b)), Dense),
    "Cholesky": (
        lambda b: theirs.CholLinearOperator(
            theirs.TriangularLinearOperator(torch.linalg.cholesky(spd(1, 12, b)))
        ),
        Dense,
    ),
    "Kronecker": (kron, KroneckerSum),
    "Kronecker with an identity": (
        lambda b: theirs.KroneckerProductLinearOperator(
            theirs.DenseLinearOperator(spd(1, 3, b)), theirs.IdentityLinearOperator(4, dtype=F64)
        ),
        KroneckerSum,
    ),
    "Kronecker + constant": (lambda b: kron(b) + constant(b), KroneckerSum),
    "constant + Kronecker": (lambda b: constant(b) + kron(b), KroneckerSum),
    "Kronecker + jitter": (lambda b: kron(b).add_jitter(0.3), KroneckerSum),
    "Kronecker + Kronecker": (lambda b: kron(b) + kron(b, 3), KroneckerSum),
    "low rank + diagonal": (lambda b: root(b) + diag(b), LowRankPlusDiag),
    "diagonal + low rank": (lambda b: diag(b) + root(b), LowRankPlusDiag),
    "low rank + constant": (lambda b: root(b) + constant(b), LowRankPlusDiag),
    "a sum of many": (
        lambda b: theirs.SumLinearOperator(
            root(b), constant(b), theirs.SumLinearOperator(kron(b), constant(b))
        ),
        Woodbury,
    ),
    "multiple": (lambda b: 2.5 * kron(b), KroneckerSum),
    "multiple of low rank": (
        lambda b: theirs.ConstantMulLinearOperator(root(b), torch.tensor(2.5, dtype=F64)) + diag(b),
        LowRankPlusDiag,
    ),
    "a multiple for each": (
        lambda b: theirs.ConstantMulLinearOperator(kron(b), positive(9, *b)) + constant(b),
        KroneckerSum,
    ),
    "a multiple of a sum": (
        lambda b: theirs.ConstantMulLinearOperator(kron(b) + constant(b), torch.tensor(2.0, dtype=F64)),
        KroneckerSum,
    ),
    "blocks": (lambda b: theirs.BlockDiagLinearOperator(blocks(b)), BlockDiag),
    "blocks + jitter": (lambda b: theirs.BlockDiagLinearOperator(blocks(b)).add_jitter(0.3), BlockDiag),
    "interleaved blocks": (lambda b: theirs.BlockInterleavedLinearOperator(blocks(b)), BlockDiag),
    "blocks of Kronecker": (
        lambda b: theirs.BlockDiagLinearOperator(
            theirs.KroneckerProductLinearOperator(spd(1, 2, (*b, 2)), spd(2, 3, (*b, 2)))
        ),
        BlockDiag,
    ),
    "repeated": (
        lambda b: theirs.BatchRepeatLinearOperator(kron(b), torch.Size((2, *(1 for _ in b)))),
        KroneckerSum,
    ),
}


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_a_structure_of_ours_becomes_ours(name: str, batch: Batch) -> None:
    make, kind = STRUCTURES[name]
    theirs_ = make(batch)
    M = theirs_.to_dense()
    P = from_linear_operator(theirs_, "precision")
    assert type(P) is kind
    close(P.to_dense().expand(M.shape), M)
    close(P.logdet().expand(M.shape[:-2]), torch.logdet(M))
    C = from_linear_operator(theirs_, "covariance")
    assert isinstance(C, Covariance)
    close(C.to_dense().expand(M.shape), M)


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_gradients_flow_to_the_tensors_of_theirs(name: str) -> None:
    theirs_ = STRUCTURES[name][0](())
    tensors = [t for t in theirs_.representation() if t.is_floating_point()]
    if not tensors:
        assert name == "identity"
        return
    theirs_.requires_grad_(True)
    found = torch.autograd.grad(from_linear_operator(theirs_, "precision").logdet().sum(), tensors)
    expected = torch.autograd.grad(torch.logdet(theirs_.to_dense()).sum(), tensors)
    for ours, right in zip(found, expected, strict=True):
        if name == "Cholesky":
            ours, right = ours.tril(), right.tril()
        if ours.ndim > 1 and ours.shape[-1] == ours.shape[-2] and name != "Cholesky":
            # a symmetric argument: only the symmetric part of a gradient has a meaning
            ours, right = ours + ours.mT, right + right.mT
        close(ours, right)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("as_", MEANINGS)
def test_our_adapter_comes_back(kind: str, as_: Any) -> None:
    P = KINDS[kind](12, (2,))
    C = from_linear_operator(P.to_linear_operator(as_), "covariance")
    assert type(C.operator) is type(P) and C.inverted == (as_ == "covariance")
    close(C.to_dense(), dense(P, as_))
    if as_ == "precision":
        back = from_linear_operator(P.to_linear_operator(as_), "precision")
        assert type(back) is type(P)
        close(back.to_dense(), P.to_dense())


def test_a_sum_in_which_ours_is_on_the_right_can_be_read() -> None:
    P = KINDS["shifted"](12, ())
    total = diag(()) + KINDS["low rank"](12, ()).to_linear_operator("precision")
    found = from_linear_operator(total, "precision")
    assert type(found) is LowRankPlusDiag
    close(found.to_dense(), diag(()).to_dense() + KINDS["low rank"](12, ()).to_dense())
    total = constant(()) + P.to_linear_operator("precision")
    close(from_linear_operator(total, "precision").to_dense(), constant(()).to_dense() + P.to_dense())


def test_a_kernel_that_is_not_evaluated_is() -> None:
    kernel = gpytorch.kernels.RBFKernel().to(F64)
    x = randn(1, 6, 2)
    found = from_linear_operator(kernel(x), "covariance")
    assert type(found.operator) is Dense
    close(found.to_dense().detach(), kernel(x).to_dense().detach())


def test_f1_f6_the_order_of_operands_does_not_matter() -> None:
    """Upstream: another class and another answer for each order, by CG and Lanczos above 800 rows."""
    n = 900
    K = theirs.KroneckerProductLinearOperator(spd(1, 30), spd(2, 30))
    I = theirs.ConstantDiagLinearOperator(torch.tensor([0.5], dtype=F64), n)
    U, D = theirs.LowRankRootLinearOperator(randn(3, n, 4)), theirs.DiagLinearOperator(positive(4, n))
    K2 = theirs.KroneckerProductLinearOperator(spd(5, 30), spd(6, 30))
    for first, second in ((K, I), (U, D), (K, K2)):
        M = first.to_dense() + second.to_dense()
        x = randn(7, n, 2)
        for total, scale in ((first + second, 1.0), (second + first, 1.0), (2.0 * (first + second), 2.0)):
            P = from_linear_operator(total, "precision")
            close(P.logdet(), torch.logdet(scale * M))
            close(P.solve(x), torch.linalg.solve(scale * M, x))


@pytest.mark.parametrize(
    ("make", "message"),
    {
        "Toeplitz": (
            lambda: theirs.ToeplitzLinearOperator(torch.arange(4.0, 0, -1)),
            "structure of a Toeplitz",
        ),
        "three factors": (
            lambda: theirs.KroneckerProductLinearOperator(spd(1, 2), spd(2, 2), spd(3, 3)),
            "two factors, found 3",
        ),
        "Kronecker + diagonal": (lambda: kron(()) + diag(()), "no exact structured form"),
        "three terms": (lambda: kron(()) + kron((), 3) + kron((), 5), "one or two terms"),
        "unequal factors": (
            lambda: (
                theirs.KroneckerProductLinearOperator(spd(1, 3), spd(2, 4))
                + theirs.KroneckerProductLinearOperator(spd(1, 4), spd(2, 3))
            ),
            "no exact structured form",
        ),
        "minus a root": (lambda: diag(()) - root(()), "negative multiple of a LowRankRoot.*downdate"),
        "a rectangle": (
            lambda: Diagonal(positive(5, 12)).to_linear_operator("precision")[[0, 1], :][:, [0, 1]],
            "structure of a Rectangle",
        ),
        "the root of ours": (
            lambda: Diagonal(positive(5, 12)).to_linear_operator("precision").root_decomposition().root,
            "structure of a RootFactor",
        ),
        "low rank alone": (lambda: root(()), "singular.*add a diagonal"),
        "triangular": (lambda: theirs.TriangularLinearOperator(torch.eye(3)), "structure of a Triangular"),
        "triangular Kronecker": (
            lambda: theirs.KroneckerProductTriangularLinearOperator(
                theirs.TriangularLinearOperator(torch.eye(2)), theirs.TriangularLinearOperator(torch.eye(2))
            ),
            "structure of a KroneckerProductTriangular",
        ),
        "entry by entry": (
            lambda: theirs.MulLinearOperator(
                theirs.RootLinearOperator(torch.eye(3)), theirs.RootLinearOperator(torch.eye(3))
            ),
            "structure of a Mul.*supported are .*KroneckerProductLinearOperator",
        ),
    }.values(),
)
def test_any_other_structure_is_refused_by_name(make: Callable[[], LinearOperator], message: str) -> None:
    with pytest.raises(NotClosedError, match=message):
        from_linear_operator(make(), "precision")


def test_a_root_is_no_summand() -> None:
    ours = Diagonal(positive(5, 12)).to_linear_operator("precision")
    with pytest.raises(NotClosedError, match="structure of a RootFactor"):
        ours + ours.root_decomposition().root


def test_the_meaning_has_to_be_known() -> None:
    with pytest.raises(ValueError, match='as_ must be "precision" or "covariance"'):
        from_linear_operator(diag(()), "both")  # type: ignore[call-overload]
