"""What an IterativePrecision may be made from, and what it refuses in one line."""

import math

import pytest
import scipy.sparse
import torch
from problems import problem
from scipy.sparse.linalg import cg
from torch import Tensor

from curvlin import (
    BlockDiag,
    Covariance,
    Dense,
    DenseFeatures,
    Diagonal,
    Gaussian,
    Isotropic,
    IterativePrecision,
    Woodbury,
)
from curvlin.testing import forbid_dense

A = problem("flat", 8)
d = torch.linspace(1, 2, 8, dtype=torch.float64)
PHI = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("source", "dense"),
    [
        (A, A),
        (A.to_sparse_coo(), A),
        (scipy.sparse.csr_array(A.numpy()), A),
        (Dense(A), A),
        (DenseFeatures(PHI), torch.einsum("nri,nrj->ij", PHI, PHI)),
        ([A, Diagonal(d)], A + torch.diag(d)),
        ([Diagonal(d), DenseFeatures(PHI), A], torch.diag(d) + torch.einsum("nri,nrj->ij", PHI, PHI) + A),
        (IterativePrecision(A) + Diagonal(d), A + torch.diag(d)),
        (Diagonal(d) + IterativePrecision(A), A + torch.diag(d)),
        (sum([IterativePrecision(A), IterativePrecision(A)]), 2 * A),
        (3 * IterativePrecision(A), 3 * A),
        (IterativePrecision([A, Diagonal(d)], preconditioner=Dense(A)) * 0.5, (A + torch.diag(d)) / 2),
    ],
)
def test_products_are_those_of_the_source(source: object, dense: Tensor) -> None:
    P = source if isinstance(source, IterativePrecision) else IterativePrecision(source)
    X = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(P @ X, dense @ X, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(P @ X[:, 0], dense @ X[:, 0], rtol=1e-13, atol=1e-13)
    assert P.shape == (8, 8) and P.dtype == torch.float64
    if bool(torch.linalg.eigvalsh(dense).min() > 1e-10):
        torch.testing.assert_close(
            P.solve(X, rtol=1e-12).require(), torch.linalg.solve(dense, X), rtol=1e-9, atol=1e-9
        )


def test_scaling_keeps_the_preconditioner_and_sums_drop_it() -> None:
    P = IterativePrecision(A, preconditioner=Dense(A))
    assert (2 * P).preconditioner is not None
    assert (2 * P).solve(d).iterations == 1
    assert (P + Diagonal(d)).preconditioner is None


def test_scipy_solves_with_it() -> None:
    x, info = cg(IterativePrecision(A).to_scipy(), d.numpy(), rtol=1e-12)
    assert info == 0
    torch.testing.assert_close(torch.from_numpy(x), torch.linalg.solve(A, d))


def test_no_draws_are_no_error() -> None:
    P = IterativePrecision([Dense(A), Diagonal(d)])
    for method in ("perturb", "lanczos"):
        assert P.sample((0, 2), method=method).require().shape == (0, 2, 8)


def test_nothing_of_size_d_times_d_is_formed() -> None:
    n = 4096
    D = Diagonal(torch.linspace(1, 2, n, dtype=torch.float64))
    U = torch.randn(n, 4, dtype=torch.float64)
    P = IterativePrecision([D, D.update(U)], preconditioner=D.update(U))
    x = torch.randn(n, dtype=torch.float64)
    with forbid_dense(n * 400):
        P.solve(x).require()
        P.solve(x, method="minres").require()
        P.logdet(4, max_steps=20)
        P.trace(20), P.diagonal(20), P.inverse_diagonal(20), P.trace_solve(D, 20)
        P.sample((3,)).require(), P.sample((3,), method="lanczos").require()
        P.low_rank(5)


ONES = torch.ones(8, dtype=torch.float64)


def hidden() -> IterativePrecision:
    W = A.clone().requires_grad_()
    return IterativePrecision(lambda X: W @ X, size=8, dtype=torch.float64)


REFUSED = {
    "no size": (lambda: IterativePrecision(lambda X: X), TypeError, "size must be given"),
    "not a source": (lambda: IterativePrecision("A"), TypeError, "source must be"),
    "empty sum": (lambda: IterativePrecision([]), ValueError, "at least one term"),
    "not square": (lambda: IterativePrecision(A[:3]), ValueError, "square"),
    "asymmetric": (lambda: IterativePrecision(A.triu()), ValueError, "symmetric"),
    "asymmetric sparse": (lambda: IterativePrecision(A.triu().to_sparse_coo()), ValueError, "symmetric"),
    "asymmetric function": (
        lambda: IterativePrecision(lambda X: A.triu() @ X, size=8, dtype=torch.float64),
        ValueError,
        "symmetric",
    ),
    "integers": (lambda: IterativePrecision(torch.eye(3, dtype=torch.long)), TypeError, "floating dtype"),
    "sparse integers": (
        lambda: IterativePrecision(torch.eye(3, dtype=torch.long).to_sparse_coo()),
        TypeError,
        "floating dtype",
    ),
    "sparse with grad": (
        lambda: IterativePrecision(A.clone().requires_grad_().to_sparse_coo()),
        TypeError,
        "parameters",
    ),
    "NaN": (lambda: IterativePrecision(A * float("nan")), ValueError, "finite"),
    "function of NaN": (
        lambda: IterativePrecision(lambda X: X / 0, size=8, dtype=torch.float64),
        ValueError,
        "finite",
    ),
    "hidden parameters": (hidden, ValueError, "parameters"),
    "a batch": (lambda: IterativePrecision(Dense(A.expand(2, 8, 8))), ValueError, "one operator"),
    "a batch of matrices": (lambda: IterativePrecision(A.expand(2, 8, 8)), ValueError, "one operator"),
    "wrong shape": (
        lambda: IterativePrecision(lambda X: X[:3], size=8, dtype=torch.float64),
        ValueError,
        "shape",
    ),
    "wrong dtype": (
        lambda: IterativePrecision(lambda X: X.float(), size=8, dtype=torch.float64),
        ValueError,
        "float32",
    ),
    "not a tensor": (lambda: IterativePrecision(lambda X: 1.0, size=8), ValueError, "float"),
    "sizes": (lambda: IterativePrecision([A, Isotropic(d[0], 9)]), ValueError, "8 rows"),
    "dtypes": (lambda: IterativePrecision([A, Dense(A.float())]), TypeError, "float64"),
    "parameters": (
        lambda: IterativePrecision(lambda X, c: c * X, (2.0,), size=8),
        TypeError,
        r"parameters\[0\]",
    ),
    "preconditioner": (lambda: IterativePrecision(A, preconditioner=A), TypeError, "PrecisionOperator"),
    "preconditioner's size": (
        lambda: IterativePrecision(A, preconditioner=Isotropic(d[0], 9)),
        ValueError,
        "preconditioner",
    ),
    "iterative preconditioner": (
        lambda: IterativePrecision(A, preconditioner=IterativePrecision(A)),
        TypeError,
        "IterativePrecision",
    ),
    "function that changes its argument": (
        lambda: IterativePrecision(lambda X: X.mul_(2.0), size=8, dtype=torch.float64),
        ValueError,
        "leave its argument",
    ),
    "NaN later": (
        lambda: IterativePrecision(
            lambda X: X * (1.0 if X.shape[-1] == 2 else float("nan")), size=8, dtype=torch.float64
        ).trace(4, method="hutchinson"),
        ValueError,
        "must be finite",
    ),
    "NaN from a root": (
        lambda: IterativePrecision(lambda X: X, size=8, dtype=torch.float64, root=lambda Z: Z / 0).sample(),
        ValueError,
        "must be finite",
    ),
    "shape of a root": (
        lambda: IterativePrecision(lambda X: X, size=8, dtype=torch.float64, root=lambda Z: Z[:2]).sample(),
        ValueError,
        "root must map",
    ),
    "one root for two": (
        lambda: IterativePrecision([lambda X: X, lambda X: 3 * X], size=8, root=lambda Z: Z),
        ValueError,
        "root must belong",
    ),
    "size beside a matrix": (lambda: IterativePrecision(A, size=7), TypeError, "size must be left out"),
    "parameters beside a matrix": (
        lambda: IterativePrecision(A, (d,)),
        TypeError,
        "parameters must be left out",
    ),
    "parameters not a tuple": (
        lambda: IterativePrecision(lambda X: X, d, size=8),
        TypeError,
        "parameters must be a tuple",
    ),
    "empty sparse": (lambda: IterativePrecision(scipy.sparse.csr_array((0, 0))), ValueError, "square"),
    "no shifts": (lambda: IterativePrecision(A).logdet(shifts=[]), ValueError, "shifts"),
    "infinite shift": (lambda: IterativePrecision(A).logdet(shifts=[math.inf]), ValueError, "shifts"),
    "oversampling": (lambda: IterativePrecision(A).low_rank(2, oversampling=-1), ValueError, "oversampling"),
    "Q's dtype": (
        lambda: IterativePrecision(A).trace_solve(Dense(A.float())),
        TypeError,
        "Q must have dtype",
    ),
    "rows": (lambda: IterativePrecision(A).solve(ONES[:3]), ValueError, "X must have shape"),
    "dimensions": (
        lambda: IterativePrecision(A) @ torch.ones(8, 2, 2, dtype=torch.float64),
        ValueError,
        "X must",
    ),
    "vector": (lambda: IterativePrecision(A).inv_quad(A), ValueError, "one vector"),
    "method": (lambda: IterativePrecision(A).solve(ONES, method="gmres"), ValueError, "method"),
    "rtol": (lambda: IterativePrecision(A).solve(ONES, rtol=0.0), ValueError, "rtol"),
    "iterations": (lambda: IterativePrecision(A).solve(ONES, max_iterations=0), ValueError, "max_iterations"),
    "probes": (lambda: IterativePrecision(A).logdet(3), ValueError, "probes"),
    "shifts": (lambda: IterativePrecision(A).logdet(shifts=[-1.0]), ValueError, "shifts"),
    "products": (lambda: IterativePrecision(A).trace(3), ValueError, "products"),
    "trace method": (lambda: IterativePrecision(A).trace(method="x"), ValueError, "method"),
    "sample method": (lambda: IterativePrecision(A).sample(method="x"), ValueError, "method"),
    "rank": (lambda: IterativePrecision(A).low_rank(9), ValueError, "rank"),
    "generator": (lambda: IterativePrecision(A).logdet(generator=3), TypeError, "generator"),
    "level": (lambda: IterativePrecision(A).trace().interval(2.0), ValueError, "level"),
    "Q": (lambda: IterativePrecision(A).trace_solve(A), TypeError, "Q must"),
    "Q's size": (lambda: IterativePrecision(A).trace_solve(Isotropic(d[0], 9)), ValueError, "Q must"),
    "scale": (lambda: IterativePrecision(A) * -1.0, ValueError, "positive"),
    "in a Gaussian": (lambda: Gaussian(ONES, IterativePrecision(A)), TypeError, "by its own"),
    "in a Covariance": (lambda: Covariance(IterativePrecision(A)), TypeError, "by its own"),
    "in Woodbury": (lambda: Woodbury(IterativePrecision(A), A), TypeError, "by its own"),
    "in BlockDiag": (lambda: BlockDiag([IterativePrecision(A)]), TypeError, "by its own"),
    "as Q of an exact trace": (lambda: Dense(A).trace_solve(IterativePrecision(A)), TypeError, "by its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str) -> None:
    ask, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as refusal:
        ask()
    assert "\n" not in str(refusal.value)
