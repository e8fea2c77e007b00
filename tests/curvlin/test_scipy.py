"""SciPy: our operators in its solvers, and its matrices as ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from interop_cases import KINDS, close, dense, each_kind, randn, spd
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh, lobpcg, minres

from curvlin import BlockDiag, Dense, Diagonal, NotClosedError
from curvlin.interop.scipy import from_scipy, to_scipy


def distance(x: Any, y: torch.Tensor) -> float:
    return float((torch.from_numpy(np.asarray(x)) - y).norm() / y.norm())


@each_kind
@pytest.mark.parametrize("as_", ["precision", "covariance"])
def test_it_multiplies_as_the_matrix(kind: str, as_: str) -> None:
    P = KINDS[kind](12, ())
    M = dense(P, as_)
    A = (P if as_ == "precision" else P.inverse()).to_scipy()
    X = randn(1, 12, 3)
    close(torch.from_numpy(A @ X.numpy()), M @ X)
    close(torch.from_numpy(A.matvec(X[:, 0].numpy())), M @ X[:, 0])
    close(torch.from_numpy(A.T @ X.numpy()), M @ X)
    close(torch.from_numpy(A.H @ X[:, :1].numpy()), M @ X[:, :1])
    close(torch.from_numpy(aslinearoperator(A).rmatmat(np.asfortranarray(X.numpy()))), M @ X)
    close(torch.from_numpy((2 * A) @ X.numpy()), 2 * M @ X)


@each_kind
def test_it_multiplies_complex_vectors(kind: str) -> None:
    P = KINDS[kind](12, ())
    Z = torch.complex(randn(1, 12, 3), randn(2, 12, 3))
    expected = P.to_dense().to(Z.dtype) @ Z
    close(torch.view_as_real(torch.from_numpy(P.to_scipy() @ Z.numpy())), torch.view_as_real(expected))
    found = torch.from_numpy(P.to_scipy().matvec(Z[:, 0].numpy()))
    close(torch.view_as_real(found), torch.view_as_real(expected[:, 0].contiguous()))
    for other in (object, "U8", "datetime64[s]"):
        with pytest.raises(TypeError, match="must hold numbers, found dtype"):
            P.to_scipy()._matmat(np.zeros((12, 1), dtype=other))


@each_kind
def test_its_solvers_find_the_solution(kind: str) -> None:
    P = KINDS[kind](12, ())
    b = randn(2, 12)
    x = torch.linalg.solve(P.to_dense(), b)
    for solver in (cg, minres):
        found, info = solver(P.to_scipy(), b.numpy(), rtol=1e-12, maxiter=500)
        assert info == 0 and distance(found, x) < 1e-6


@each_kind
def test_the_inverse_preconditions_in_one_step(kind: str) -> None:
    P = KINDS[kind](900, ())
    M = P.factor().inverse().to_scipy()
    b = randn(3, 900)
    for solver in (cg, minres):
        steps: list[Any] = []
        found, info = solver(P.to_scipy(), b.numpy(), M=M, rtol=1e-8, maxiter=5, callback=steps.append)
        assert info == 0 and len(steps) <= (1 if solver is cg else 2)
        assert distance(P.to_scipy() @ found, b) < 1e-7


@each_kind
def test_its_eigensolvers_find_the_largest_eigenvalues(kind: str) -> None:
    P = KINDS[kind](900, ())
    if kind == "isotropic":
        return  # every vector is an eigenvector
    largest = torch.linalg.eigvalsh(P.to_dense())[-3:].flip(0)
    found = eigsh(P.to_scipy(), k=3, return_eigenvectors=False, v0=np.ones(900))
    assert distance(np.sort(found)[::-1].copy(), largest) < 1e-10
    start = np.random.default_rng(0).standard_normal((900, 6))
    blockwise, _ = lobpcg(P.to_scipy(), start, largest=True, maxiter=200, tol=1e-6)
    assert distance(np.sort(blockwise)[::-1][:3].copy(), largest) < 1e-6


def test_lobpcg_is_preconditioned_by_the_inverse_towards_the_smallest_eigenvalues() -> None:
    P = KINDS["shifted"](900, ())
    start = np.random.default_rng(0).standard_normal((900, 5))
    found, _ = lobpcg(
        P.to_scipy(), start, M=P.factor().inverse().to_scipy(), largest=False, maxiter=100, tol=1e-5
    )
    assert distance(np.sort(found)[:1], torch.linalg.eigvalsh(P.to_dense())[:1]) < 1e-6


# -- from_scipy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.array, np.asfortranarray])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_is_dense_and_copied(make: Any, dtype: Any) -> None:
    M = make(spd(1, 5).numpy().astype(dtype))
    P = from_scipy(M)
    assert type(P) is Dense and P.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    assert np.array_equal(P.to_dense().numpy(), (M + M.T) / 2)
    before = P.to_dense().clone()
    M[:] = 0
    assert torch.equal(P.to_dense(), before)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dia", "bsr", "lil", "dok"])
def test_a_sparse_diagonal_is_diagonal(form: str) -> None:
    d = np.array([1.0, 2.0, 0.5])
    P = from_scipy(sparse.diags_array(d).asformat(form))
    assert type(P) is Diagonal and np.array_equal(P.diagonal().numpy(), d)
    assert type(from_scipy(sparse.eye_array(4))) is Diagonal
    assert type(from_scipy(sparse.identity(4))) is Diagonal


def test_separate_groups_of_rows_are_blocks() -> None:
    pieces = [spd(1, 3), spd(2, 1), spd(3, 4), spd(4, 1)]
    order = np.random.default_rng(0).permutation(9)
    M = scipy.linalg.block_diag(*(p.numpy() for p in pieces))[order][:, order]
    for form in ("csr", "csc", "coo"):
        given = sparse.csr_array(M).asformat(form)
        P = from_scipy(given)
        assert isinstance(P, BlockDiag) and sorted(b.size for b in P.blocks) == [2, 3, 4]
        assert [type(b) for b in P.blocks] == [Dense, Dense, Diagonal]
        close(P.to_dense(), torch.from_numpy(M))
        assert np.array_equal(given.toarray(), M)


def test_repeated_and_zero_entries_are_added_and_kept() -> None:
    rows, columns = [0, 0, 1, 1, 2, 2, 3], [0, 0, 1, 0, 2, 3, 3]
    values = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 2.0]
    given = sparse.coo_array((values, (rows, columns)), shape=(4, 4))
    P = from_scipy(given)
    assert isinstance(P, BlockDiag) and [b.size for b in P.blocks] == [2, 2]
    assert P.to_dense().tolist() == given.toarray().tolist()
    assert given.nnz == 7


def test_what_to_scipy_made_comes_back() -> None:
    P = KINDS["shifted"](12, ())
    assert from_scipy(P.to_scipy()) is P
    C = P.inverse()
    assert from_scipy(to_scipy(C)) is C


TRIDIAGONAL = sparse.diags_array([-np.ones(9), 2 * np.ones(10), -np.ones(9)], offsets=[-1, 0, 1])


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    {
        "connected": (
            TRIDIAGONAL,
            NotClosedError,
            r"10 rows are all connected; use curvlin.IterativePrecision",
        ),
        "too large a block": (
            sparse.block_diag([TRIDIAGONAL, np.eye(1)]),
            NotClosedError,
            "block of 10 rows, more than max_size=5",
        ),
        "an operator": (
            LinearOperator((3, 3), matvec=lambda v: v, dtype=np.float64),
            NotClosedError,
            "IterativePrecision",
        ),
        "a product of operators": (
            2 * KINDS["shifted"](12, ()).to_scipy(),
            NotClosedError,
            "IterativePrecision",
        ),
        "not symmetric": (np.array([[1.0, 0.5], [0.0, 1.0]]), ValueError, "symmetric"),
        "not symmetric, sparse": (
            sparse.csr_array(np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])),
            ValueError,
            "symmetric",
        ),
        "not square": (np.ones((2, 3)), ValueError, "square"),
        "a vector": (np.ones(3), ValueError, "square"),
        "integers": (np.eye(3, dtype=int), TypeError, "float32 or float64"),
        "complex": (sparse.eye_array(3, dtype=complex), TypeError, "float32 or float64"),
        "NaN": (np.array([[np.nan]]), ValueError, "finite"),
        "a list": ([[1.0]], TypeError, "found list"),
        "a tensor": (torch.eye(2), TypeError, "found Tensor"),
    }.values(),
)
def test_any_other_matrix_is_refused(matrix: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_scipy(matrix, max_size=5)
