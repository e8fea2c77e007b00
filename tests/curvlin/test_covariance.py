"""Covariances: inverses held as precisions, and matrices of any rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from feature_cases import ANY_SIZE, KRONECKER_KINDS, close, features, generator, precision, randn, spd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlin import Covariance, Dense, Diagonal, Isotropic, NotClosedError, NotPositiveDefiniteError

KINDS = (*ANY_SIZE, *KRONECKER_KINDS)
seeds = st.integers(0, 2**20)


def both(kind: str, seed: int) -> list[tuple[Covariance, Tensor]]:
    """The inverse of a precision, and the same covariance as a matrix."""
    P = precision(kind, seed)
    C = torch.linalg.inv(P.matrix)
    C = (C + C.mT) / 2
    return [(P.operator.inverse(), C), (Covariance.of(C), C)]


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_equal_the_dense_matrix(kind: str) -> None:
    X, x = randn(generator(1), 12, 3), randn(generator(2), 12)
    for C, matrix in both(kind, 3):
        inverse = torch.linalg.inv(matrix)
        close(C.to_dense(), matrix)
        close(C @ X, matrix @ X, 1e-9)
        close(x @ C, x @ matrix, 1e-9)
        close(C.solve(X), inverse @ X, 1e-9)
        close(C.logdet(), torch.logdet(matrix), 1e-9)
        close(C.quad(x), x @ matrix @ x, 1e-9)
        close(C.inv_quad(x), x @ inverse @ x, 1e-9)
        close(C.diagonal(), matrix.diagonal(), 1e-9)
        close(C.inverse().to_dense(), inverse, 1e-9)
        close(C.marginal([7, 2]).to_dense(), matrix[[7, 2]][:, [7, 2]], 1e-9)
        assert C.shape == matrix.shape


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_exactly_this_covariance(kind: str) -> None:
    """No Monte Carlo: the identity is pushed through the map from noise to draws."""
    for C, matrix in both(kind, 4):
        F = C.colour(torch.eye(12, dtype=torch.float64)).mT
        close(F @ F.mT, matrix, 1e-9)


@pytest.mark.parametrize("kind", ["dense", "khatri_rao"])
def test_congruence(kind: str) -> None:
    Phi, rows = features(kind, 5), randn(generator(6), 4, 12)
    for C, matrix in both("shifted", 7):
        close(C.congruence(rows), rows @ matrix @ rows.mT, 1e-9)
        close(C.congruence(Phi.operator), Phi.rows @ matrix @ Phi.rows.mT, 1e-9)
        joint = torch.einsum("nrd,de,mqe->nrmq", Phi.rows, matrix, Phi.rows)
        close(C.congruence(Phi.operator, joint=True), joint, 1e-9)


def test_a_float32_congruence_is_right_to_the_last_digit() -> None:
    """Entries are the float64 ones, rounded once, so that a rank can be told from them."""
    P = precision("shifted", 8).operator.to(torch.float32)
    Phi = features("khatri_rao", 9, N=4, R=3, S=4).operator.to(torch.float32)
    exact = P.to(torch.float64).inv_congruence(Phi.to(torch.float64))
    assert torch.equal(P.inverse().congruence(Phi), exact.to(torch.float32))


def test_the_inverse_is_the_operator_itself() -> None:
    P = Diagonal(torch.tensor([1.0, 2.0]))
    assert P.inverse().inverse() is P


@given(seed=seeds, rank=st.integers(0, 4), exponent=st.integers(-200, 200))
def test_a_singular_matrix_has_draws_but_no_density(seed: int, rank: int, exponent: int) -> None:
    """Whatever its scale: the rank is relative."""
    L = randn(generator(seed), 5, rank)
    matrix = (L @ L.mT) * 2.0**exponent
    C = Covariance.of(matrix)
    F = C.colour(torch.eye(5, dtype=torch.float64)).mT
    close(F @ F.mT, matrix, 1e-12)
    for question in (C.logdet, C.inverse, lambda: C.solve(torch.ones(5).double())):
        with pytest.raises(NotPositiveDefiniteError, match="Covariance is not positive definite"):
            question()


@given(seed=seeds, exponents=st.lists(st.integers(-40, 40), min_size=4, max_size=4))
def test_rank_does_not_see_units(seed: int, exponents: list[int]) -> None:
    """A regular matrix stays regular when each coordinate is measured in its own unit."""
    units = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    matrix = spd(generator(seed), 4)
    scaled = units[:, None] * matrix * units
    expected = torch.logdet(matrix) + 2 * units.log().sum()
    assert abs(float(Covariance.of(scaled).logdet() - expected)) < 1e-10 * (1 + abs(float(expected)))


def test_a_batch_with_one_singular_element() -> None:
    matrices = torch.stack([torch.eye(3), torch.ones(3, 3)]).double()
    C = Covariance.of(matrices)
    F = C.colour(torch.eye(3, dtype=torch.float64).unsqueeze(1)).movedim(0, -1)
    close(F @ F.mT, matrices, 1e-12)
    with pytest.raises(NotPositiveDefiniteError):
        C.logdet()


@pytest.mark.parametrize("smallest", [-1.0, -1e-3])
def test_a_negative_eigenvalue_is_refused_even_for_draws(smallest: float) -> None:
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Covariance.of(torch.diag(torch.tensor([1.0, smallest]))).sample()
    assert caught.value.value == pytest.approx(smallest)


@pytest.mark.parametrize("name", ["colour", "quad", "inv_quad", "logdet", "solve"])
def test_two_derivatives_in_a_matrix(name: str) -> None:
    x = randn(generator(10), 3)

    def value(X: Tensor) -> Tensor:
        method: Callable[..., Tensor] = getattr(Covariance.of(X @ X.mT), name)
        return method() if name == "logdet" else method(x)

    X = randn(generator(11), 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(value, (X,))
    assert torch.autograd.gradgradcheck(value, (X,))


def test_a_draw_of_a_singular_matrix_has_no_derivative() -> None:
    matrix = torch.ones(2, 2).requires_grad_()
    with pytest.raises(NotClosedError, match="no derivative"):
        Covariance.of(matrix).sample()
    with torch.no_grad():
        draw = Covariance.of(matrix).sample((3,))
    assert torch.equal(draw[:, 0], draw[:, 1]) and float(draw.abs().max()) > 0


def test_draws_follow_the_generator() -> None:
    C = precision("shifted", 12).operator.inverse()
    first, second = (C.sample((4,), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    state = torch.get_rng_state()
    C.sample((4,), torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_inverse_quadratic_form_keeps_its_digits_in_weak_directions() -> None:
    """A draw of N(0, P^-1) has x^T P x near D; formed as x . (P x) it has the rounding of |P| |x|^2."""
    g = generator(13)
    Q = torch.linalg.qr(randn(g, 6, 6)).Q
    spectrum = 10.0 ** torch.linspace(-6, 6, 6, dtype=torch.float64)
    P = Dense((Q * spectrum) @ Q.mT)
    z = randn(g, 6)
    x = P.unwhiten(z)
    assert abs(float(P.inverse().inv_quad(x) / z.square().sum()) - 1) < 1e-9


# -- SciPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scipy_operators_have_the_same_products(kind: str) -> None:
    P, X = precision(kind, 14), randn(generator(15), 12, 3)
    for ours, matrix in ((P.operator, P.matrix), (P.operator.inverse(), torch.linalg.inv(P.matrix))):
        theirs = scipy.sparse.linalg.aslinearoperator(ours.to_scipy())
        close(torch.as_tensor(theirs.matvec(X[:, 0].numpy())), matrix @ X[:, 0], 1e-9)
        close(torch.as_tensor(theirs.rmatvec(X[:, 0].numpy())), matrix @ X[:, 0], 1e-9)
        close(torch.as_tensor(theirs @ X.numpy()), matrix @ X, 1e-9)
        assert theirs.dtype == np.float64 and theirs.shape == (12, 12)


def test_the_inverse_is_a_perfect_preconditioner() -> None:
    P, b = precision("updated", 16), randn(generator(17), 12)
    iterations: list[Any] = []
    x, failed = scipy.sparse.linalg.cg(
        P.operator.to_scipy(),
        b.numpy(),
        M=P.operator.factor().inverse().to_scipy(),
        rtol=1e-9,
        callback=iterations.append,
    )
    assert failed == 0 and len(iterations) == 1
    close(torch.as_tensor(x), torch.linalg.solve(P.matrix, b), 1e-8)


def test_scipy_eigenvalues() -> None:
    P = precision("shifted", 18)
    largest = scipy.sparse.linalg.eigsh(P.operator.to_scipy(), k=2, return_eigenvectors=False)
    close(torch.as_tensor(np.sort(largest)), torch.linalg.eigvalsh(P.matrix)[-2:], 1e-9)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a matrix": (lambda: Covariance(torch.eye(2)), TypeError, r"Covariance.of\(matrix\)"),  # type: ignore[arg-type]
    "not symmetric": (lambda: Covariance.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), ValueError, "symmetric"),
    "not square": (lambda: Covariance.of(torch.ones(2, 3)), ValueError, "square"),
    "integers": (lambda: Covariance.of(torch.eye(2, dtype=torch.long)), TypeError, "floating"),
    "scipy of a batch": (
        lambda: Diagonal(torch.ones(2, 3)).inverse().to_scipy(),
        ValueError,
        "batch of shape",
    ),
    "scipy of half": (lambda: Diagonal(torch.ones(3).half()).to_scipy(), TypeError, "float32 or float64"),
    "scipy elsewhere": (lambda: Isotropic(1.0, 2).to("meta").to_scipy(), ValueError, "CPU"),
    "congruence of another size": (
        lambda: Covariance.of(torch.eye(2)).congruence(torch.ones(1, 3)),
        ValueError,
        "Phi",
    ),
    "product of another size": (lambda: Covariance.of(torch.eye(2)) @ torch.ones(3), ValueError, "2 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
