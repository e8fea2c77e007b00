"""Conjugate gradients, MINRES and draws: what they promise about residuals, and how they say that they failed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import SPECTRA, near, problem, symmetric
from scipy.sparse.linalg import minres as scipy_minres
from torch import Tensor

from curvlin import (
    Dense,
    Diagonal,
    Isotropic,
    IterativePrecision,
    KroneckerSum,
    NotClosedError,
    NotConvergedError,
    NotPositiveDefiniteError,
)

METHODS = ["cg", "minres"]


def relative_residual(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(b - A @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)


@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    method=st.sampled_from(METHODS),
    log2scale=st.integers(-40, 40),
    log2rhs=st.integers(-40, 40),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    preconditioned=st.booleans(),
    columns=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_the_residual_is_what_it_says_and_within_the_tolerance(
    spectrum: str,
    method: str,
    log2scale: int,
    log2rhs: int,
    dtype: torch.dtype,
    preconditioned: bool,
    columns: int,
    seed: int,
) -> None:
    A = problem(spectrum, 24, seed)
    M = Dense((near(A) * 2.0**log2scale).to(dtype)) if preconditioned else None
    A = (A * 2.0**log2scale).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn((24, columns) if columns else (24,), generator=generator, dtype=dtype) * 2.0**log2rhs
    solution = IterativePrecision(A, preconditioner=M).solve(b, method=method)
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    assert solution.converged and solution.ended == "converged"
    assert solution.value.shape == b.shape and solution.value.dtype == dtype
    assert solution.residual.shape == b.shape[1:]
    true = relative_residual(A.double(), solution.value.double(), b.double())
    rounding = 100 * torch.finfo(dtype).eps * 24
    assert bool((solution.residual <= tolerance).all())
    assert bool(((true - solution.residual).abs() <= rounding).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-12])
def test_solutions_are_those_of_the_dense_solve(method: str, rtol: float) -> None:
    A = problem("flat", 50)
    b = torch.randn(50, 3, dtype=torch.float64)
    solution = IterativePrecision(A, preconditioner=Dense(near(A))).solve(b, method=method, rtol=rtol)
    exact = torch.linalg.solve(A, b)
    assert float((solution.require() - exact).norm() / exact.norm()) < 4 * rtol  # cond(A) = 2


@pytest.mark.parametrize("method", METHODS)
def test_an_exact_preconditioner_needs_one_iteration(method: str) -> None:
    A = problem("decay")
    b = torch.randn(60, dtype=torch.float64)
    solution = IterativePrecision(A, preconditioner=Dense(A)).solve(b, method=method)
    assert solution.converged and solution.iterations == 1


def test_preconditioning_cuts_the_iterations_of_a_sum_without_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    left = symmetric(torch.logspace(0, 3, 12, dtype=torch.float64))
    right = symmetric(torch.logspace(0, 2, 10, dtype=torch.float64), 1)
    K = KroneckerSum.shifted(left, right, torch.tensor(0.1, dtype=torch.float64))
    d = Diagonal(torch.rand(120, dtype=torch.float64, generator=generator))
    with pytest.raises(NotClosedError):
        K + d
    P = IterativePrecision([K, d])
    dense = K.to_dense() + torch.diag(d.diagonal())
    b = torch.randn(120, dtype=torch.float64, generator=generator)
    alone, helped = P.solve(b), P.preconditioned_by(K).solve(b)
    for solution in (alone, helped):
        assert float(relative_residual(dense, solution.require(), b)) < 2e-8
    assert helped.iterations < alone.iterations / 3


def test_zero_columns_and_mixed_columns_have_their_own_residuals() -> None:
    A = problem("polynomial", 30)
    b = torch.zeros(30, 3, dtype=torch.float64)
    b[:, 1], b[:, 2] = torch.randn(30, dtype=torch.float64), 1e-30 * torch.randn(30, dtype=torch.float64)
    for method in METHODS:
        x = IterativePrecision(A).solve(b, method=method).require()
        assert torch.equal(x[:, 0], torch.zeros(30, dtype=torch.float64))
        assert float(relative_residual(A, x[:, 1:], b[:, 1:]).max()) < 2e-8


def test_an_unfinished_solve_says_so_and_cannot_be_taken_for_an_answer() -> None:
    A = problem("decay")
    b = torch.randn(60, dtype=torch.float64)
    solution = IterativePrecision(A).solve(b, max_iterations=5)
    assert not solution.converged and solution.ended == "iteration limit" and solution.iterations == 5
    assert float(solution.residual) == pytest.approx(float(relative_residual(A, solution.value, b)), rel=1e-8)
    with pytest.raises(NotConvergedError, match=r"5 iterations .*preconditioner") as refusal:
        solution.require()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_below_rounding_ends_as_stagnated(method: str) -> None:
    A = problem("decay")
    b = torch.randn(60, dtype=torch.float64)
    P = IterativePrecision(A, preconditioner=Dense(near(A)))
    solution = P.solve(b, method=method, rtol=1e-17, max_iterations=5000)
    assert solution.ended == "stagnated" and not solution.converged
    assert float(solution.residual) < 1e-10  # and the best that was found is what is returned


def test_an_indefinite_matrix_is_refused_by_conjugate_gradients_and_solved_by_minres() -> None:
    values = torch.linspace(-1, 2, 41, dtype=torch.float64)
    A = symmetric(values)
    b = torch.randn(41, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="IterativePrecision") as refusal:
        IterativePrecision(A).solve(b)
    assert -1 <= refusal.value.value <= 0  # a Rayleigh quotient: proof
    x = IterativePrecision(A).solve(b, method="minres").require()
    assert float((x - torch.linalg.solve(A, b)).norm() / x.norm()) < 1e-5


def test_minres_solves_a_singular_system_that_has_a_solution() -> None:
    values = torch.cat([torch.zeros(10, dtype=torch.float64), torch.linspace(1, 5, 30, dtype=torch.float64)])
    A = symmetric(values)
    b = A @ torch.randn(40, dtype=torch.float64)
    x = IterativePrecision(A).solve(b, method="minres", rtol=1e-10).require()
    least = torch.linalg.pinv(A, hermitian=True) @ b
    assert float((x - least).norm() / least.norm()) < 1e-8
    # An independent implementation takes as many steps.
    steps: list[int] = []
    scipy_minres(A.numpy(), b.numpy(), rtol=1e-10, callback=lambda _: steps.append(1))
    ours = IterativePrecision(A).solve(b, method="minres", rtol=1e-10).iterations
    assert abs(ours - len(steps)) <= 3


def test_minres_says_that_an_inconsistent_singular_system_is_not_solved() -> None:
    A = symmetric(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    null = torch.linalg.eigh(A)[1][:, 0]
    solution = IterativePrecision(A).solve(null, method="minres")
    assert not solution.converged and float(solution.residual) == pytest.approx(1.0)


def test_minres_stops_each_column_where_its_krylov_space_ends() -> None:
    """The least-squares residual for what has no solution, and the solution beside it for what has one."""
    values = torch.cat([torch.zeros(10, dtype=torch.float64), torch.linspace(1, 2, 30, dtype=torch.float64)])
    A = symmetric(values)
    b = torch.randn(40, dtype=torch.float64)
    both = torch.stack([A @ b, b], dim=-1)
    solution = IterativePrecision(A).solve(both, method="minres")
    least = torch.linalg.vector_norm(b - A @ torch.linalg.pinv(A, hermitian=True) @ b) / b.norm()
    assert float(solution.residual[0]) < 2e-8 and not solution.converged
    assert float(solution.residual[1]) == pytest.approx(float(least), rel=1e-3)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-8])
def test_lanczos_draws_are_as_near_as_they_say(rtol: float) -> None:
    A = symmetric(torch.logspace(0, -4, 200, dtype=torch.float64))
    theta, V = torch.linalg.eigh(A)
    for seed in range(5):
        z = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        exact = V @ (theta.rsqrt() * (V.mT @ z))
        draw = IterativePrecision(A).sample(
            (), torch.Generator().manual_seed(seed), method="lanczos", rtol=rtol
        )
        assert float((draw.require() - exact).norm() / exact.norm()) < 5 * rtol


@pytest.mark.parametrize("method", METHODS)
def test_the_quadratic_form_has_twice_the_digits_of_the_solve(method: str) -> None:
    A = problem("flat", 50)
    x = torch.randn(50, dtype=torch.float64)
    exact = x @ torch.linalg.solve(A, x)
    quad = IterativePrecision(A).inv_quad(x, method=method, rtol=1e-4)
    below = float((exact - quad.value) / exact)
    assert -1e-14 < below < 1e-8


# -- draws --------------------------------------------------------------------------------------------------------


def test_perturbed_draws_have_the_covariance_of_the_inverse_exactly() -> None:
    """The noise is the identity, so that the draws are the root that the sampler uses: no Monte Carlo."""
    A, d = problem("flat", 20), torch.linspace(1, 3, 20, dtype=torch.float64)
    P = IterativePrecision([Dense(A), Diagonal(d)], preconditioner=Dense(A))
    roots = torch.cat(
        [
            P.preconditioned_by(Dense(A)).solve(R, rtol=1e-13).require()
            for R in (
                Dense(A).root_matvec(torch.eye(20, dtype=torch.float64)).mT,
                torch.diag(d.sqrt()),
            )
        ],
        dim=-1,
    )
    torch.testing.assert_close(roots @ roots.mT, torch.linalg.inv(A + torch.diag(d)), rtol=1e-10, atol=1e-12)
    # And a draw is that root times the noise of the terms, in order.
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(20, dtype=torch.float64, generator=generator) for _ in range(2)]
    draw = P.sample((), torch.Generator().manual_seed(5), rtol=1e-13).require()
    torch.testing.assert_close(draw, roots @ torch.cat(noise), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_lanczos_draws_are_a_square_root_of_the_inverse(spectrum: str, preconditioned: bool) -> None:
    A = problem(spectrum, 30)
    M = Dense(near(A)) if preconditioned else None
    P = IterativePrecision(lambda X: A @ X, size=30, dtype=torch.float64, preconditioner=M)
    with pytest.raises(NotClosedError, match="root="):
        P.sample((2,))
    draws = P.sample((4, 30), torch.Generator().manual_seed(3), method="lanczos", rtol=1e-12)
    assert draws.converged and draws.value.shape == (4, 30, 30) and draws.residual.shape == (4, 30)
    Z = torch.randn(4, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # draws = F z with F F^T = P^-1, F found from the first thirty.
    F = torch.linalg.solve(Z[0], draws.value[0]).mT
    exact = torch.linalg.inv(A)
    assert float((F @ F.mT - exact).norm() / exact.norm()) < 1e-8
    torch.testing.assert_close(draws.value[1], Z[1] @ F.mT, rtol=1e-7, atol=1e-7 * float(exact.norm()) ** 0.5)


def test_draws_of_a_function_use_its_root() -> None:
    J = torch.randn(15, 25, dtype=torch.float64)
    P = IterativePrecision(
        [
            Isotropic(torch.tensor(2.0, dtype=torch.float64), 25),
            IterativePrecision(
                lambda X, J: J.mT @ (J @ X), (J,), size=25, root=lambda Z, J: J.mT @ Z, root_size=15
            ),
        ]
    )
    draws = P.sample((20000,), torch.Generator().manual_seed(1)).require()
    exact = torch.linalg.inv(J.mT @ J + 2 * torch.eye(25, dtype=torch.float64))
    found = draws.mT @ draws / 20000
    # Entries of a sample covariance have variance (s_ij^2 + s_ii s_jj) / n.
    z = (found - exact) / ((exact.square() + exact.diagonal()[:, None] * exact.diagonal()) / 20000).sqrt()
    assert float(z.abs().max()) < 4.5  # 325 entries
