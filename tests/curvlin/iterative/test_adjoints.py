"""Derivatives by the adjoint method, against autograd through dense algebra."""

import pytest
import torch
from problems import near, problem
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from curvlin import Dense, Diagonal, IterativePrecision, KroneckerSum, NotClosedError, NotConvergedError

SIZE = 6
TIGHT = {"rtol": 1e-13}


def assembled(L: Tensor, d: Tensor) -> Tensor:
    return L @ L.mT + torch.diag(d)


def by_function(L: Tensor, d: Tensor) -> IterativePrecision:
    return IterativePrecision(
        lambda X, L, d: L @ (L.mT @ X) + d[:, None] * X,
        (L, d),
        size=SIZE,
        root=lambda Z, L, d: L @ Z[:3] + d.sqrt()[:, None] * Z[3:],
        root_size=3 + SIZE,
    )


def by_operators(L: Tensor, d: Tensor) -> IterativePrecision:
    return IterativePrecision([Diagonal(d).update(L), Diagonal(d)], preconditioner=Diagonal(d)) * 0.5


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    L = torch.randn(SIZE, 3, dtype=torch.float64, generator=g)
    d = torch.rand(SIZE, dtype=torch.float64, generator=g) + 0.5
    b = torch.randn(SIZE, 2, dtype=torch.float64, generator=g)
    return tuple(t.requires_grad_() for t in (L, d, b))  # type: ignore[return-value]


ANSWERS = {
    "solve": lambda P, b: P.solve(b, **TIGHT).value,
    "solve by minres": lambda P, b: P.solve(b[:, 0], method="minres", **TIGHT).value,
    "inv_quad": lambda P, b: P.inv_quad(b[:, 0], **TIGHT).value,
    "sample": lambda P, b: P.sample((2,), torch.Generator().manual_seed(0), **TIGHT).value + b.sum(),
    "product": lambda P, b: P @ b,
}


@pytest.mark.parametrize("make", [by_function, by_operators])
@pytest.mark.parametrize("answer", ANSWERS)
def test_first_and_second_derivatives(answer: str, make: object) -> None:
    def ask(L: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return ANSWERS[answer](make(L, d), b)  # type: ignore[operator]

    assert gradcheck(ask, inputs(), atol=1e-6)
    assert gradgradcheck(ask, inputs(), atol=1e-5)


def test_gradients_equal_those_of_the_dense_solve() -> None:
    L, d, b = inputs()
    ours = torch.autograd.grad(by_function(L, d).solve(b, **TIGHT).value.square().sum(), (L, d, b))
    dense = torch.autograd.grad(torch.linalg.solve(assembled(L, d), b).square().sum(), (L, d, b))
    for found, exact in zip(ours, dense, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


def test_gradients_of_a_log_determinant_are_unbiased() -> None:
    """Over many seeds they scatter around the truth."""
    L, d, _ = inputs()
    exact = torch.autograd.grad(torch.logdet(assembled(L, d)), (L, d))
    for preconditioner in (None, Dense(near(assembled(L, d).detach()))):
        found: list[list[Tensor]] = [[], []]
        for seed in range(300):
            P = by_function(L, d).preconditioned_by(preconditioner)
            logdet = P.logdet(4, generator=torch.Generator().manual_seed(seed)).value
            for column, gradient in zip(found, torch.autograd.grad(logdet, (L, d)), strict=True):
                column.append(gradient)
        for column, truth in zip(found, exact, strict=True):
            samples = torch.stack(column)
            z = (samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5)
            assert float(z.abs().max()) < 4


def test_second_derivatives_of_a_log_determinant_are_unbiased() -> None:
    L, d, _ = inputs()
    direction = torch.randn_like(d)

    def second(value: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(value, d, create_graph=True)
        return torch.autograd.grad((g * direction).sum(), d)[0]

    exact = second(torch.logdet(assembled(L, d)))
    P = by_function(L, d).preconditioned_by(Dense(near(assembled(L, d).detach())))
    samples = torch.stack(
        [second(P.logdet(4, generator=torch.Generator().manual_seed(s), **TIGHT).value) for s in range(300)]
    )
    z = (samples.mean(0) - exact) / (samples.std(0) / len(samples) ** 0.5)
    assert float(z.abs().max()) < 4


def test_gradients_flow_to_the_tensors_of_structured_terms() -> None:
    A, B = (problem("flat", n).requires_grad_() for n in (4, 5))
    d = torch.linspace(1, 2, 20, dtype=torch.float64, requires_grad=True)
    b = torch.randn(20, dtype=torch.float64)
    P = IterativePrecision([KroneckerSum([(A, B)]), Diagonal(d)])
    ours = torch.autograd.grad(P.inv_quad(b, rtol=1e-12).value, (A, B, d))
    dense = torch.autograd.grad(b @ torch.linalg.solve(torch.kron(A, B) + torch.diag(d), b), (A, B, d))
    for found, exact in zip(ours, dense, strict=True):
        torch.testing.assert_close(
            (found + found.mT) / 2 if found.ndim == 2 else found,
            (exact + exact.mT) / 2 if exact.ndim == 2 else exact,
            rtol=1e-9,
            atol=1e-10,
        )


def test_an_adjoint_solve_that_does_not_converge_raises() -> None:
    A = problem("decay", 60).requires_grad_()
    solution = IterativePrecision(A).solve(A.detach()[:, 0] * 0 + 1, max_iterations=3)
    with pytest.raises(NotConvergedError):
        solution.value.sum().backward()


def test_lanczos_draws_refuse_derivatives_and_traces_have_none() -> None:
    L, d, _ = inputs()
    with pytest.raises(NotClosedError, match="perturb"):
        by_function(L, d).sample((2,), method="lanczos")
    assert not by_function(L, d).trace(6).value.requires_grad
    assert not by_function(L, d).low_rank(2).U.requires_grad


def test_gradients_of_a_log_determinant_do_not_depend_on_the_quadrature() -> None:
    A = problem("decay", 60)
    c = torch.zeros((), dtype=torch.float64, requires_grad=True)
    P = IterativePrecision(lambda X, c: A @ X + c * X, (c,), size=60)
    found = [
        torch.autograd.grad(P.logdet(8, generator=torch.Generator().manual_seed(0), max_steps=k).value, c)[0]
        for k in (1, 50)
    ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ask", ["product", "solve", "inv_quad"])
@pytest.mark.parametrize("kind", ["sparse", "NumPy"])
def test_terms_outside_of_autograd_have_derivatives_in_the_right_hand_side(kind: str, ask: str) -> None:
    """A sparse matrix, or a function that goes through NumPy, is symmetric: its derivative is itself."""
    A = problem("flat", SIZE)
    d = torch.linspace(1, 2, SIZE, dtype=torch.float64).requires_grad_()
    x = torch.randn(SIZE, dtype=torch.float64).requires_grad_()

    def outside() -> IterativePrecision:
        if kind == "sparse":
            return IterativePrecision(A.to_sparse())
        return IterativePrecision(
            lambda X: torch.from_numpy(A.numpy() @ X.detach().numpy()), size=SIZE, dtype=torch.float64
        )

    def answer(d: Tensor, x: Tensor) -> Tensor:
        P = outside() + Diagonal(d)
        value: Tensor = {
            "product": lambda: P @ x,
            "solve": lambda: P.solve(x, **TIGHT).value,
            "inv_quad": lambda: P.inv_quad(x, **TIGHT).value,
        }[ask]()
        return value

    assert gradcheck(answer, (d, x), atol=1e-6)
    assert gradgradcheck(answer, (d, x), atol=1e-5)
