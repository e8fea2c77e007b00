"""Compiled code that holds operators gives what the same code gives uncompiled, values and gradients."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from draws import randn
from torch import Tensor

from curvlin import (
    BlockDiag,
    Dense,
    DenseFeatures,
    Diagonal,
    Gaussian,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    LowRankPlusDiag,
    NotPositiveDefiniteError,
    PrecisionOperator,
)
from curvlin.testing import KINDS, Spec, make_case

# While it resumes after a graph break, the compiler looks at the .grad of tensors that are not leaves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

f64 = torch.float64


def spd(n: int, seed: int) -> Tensor:
    root = randn(n, n, seed=seed)
    return root @ root.mT + torch.eye(n, dtype=f64)


A, B, x = spd(3, 1), spd(2, 2), randn(6, seed=3)
U, S = randn(6, 2, seed=4), randn(4, 3, 2, seed=5)
ROWS = DenseFeatures(randn(4, 2, 6, seed=6))
LAYER = KhatriRaoFeatures(randn(4, 2, 5, 3, seed=7), randn(4, 5, 2, seed=8))
GIVEN = KroneckerSum([(A, B)], shift=torch.tensor(0.5, dtype=f64))

Program = Callable[[Tensor, Tensor, PrecisionOperator], Tensor]


def built(A: Tensor) -> KroneckerSum:
    return KroneckerSum([(A + A.sin().mT @ A.sin(), B)], shift=0.5)


def blocks(A: Tensor, x: Tensor) -> BlockDiag:
    return BlockDiag([Dense(A), Diagonal(x[:3].exp())], [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])])


# Each mixes operators made inside and outside with tensor code that the compiler sees.
PROGRAMS: dict[str, Program] = {
    "logdet": lambda A, x, P: built(A).logdet().exp() + P.logdet(),
    "solve": lambda A, x, P: built(A).solve(x.exp()).sin(),
    "inv_quad": lambda A, x, P: P.inv_quad(x.cos()) * 2,
    "P @ x": lambda A, x, P: built(A) @ x.exp() + P @ x,
    "x @ P": lambda A, x, P: x.exp() @ built(A) + x @ P,
    "sum": lambda A, x, P: (P + Isotropic(torch.tensor(0.3, dtype=f64), 6)).solve(x).sin(),
    "product": lambda A, x, P: (2.0 * P).solve(x).sin(),
    "update": lambda A, x, P: P.update(U * x.unsqueeze(-1)).logdet() + 1,
    "low rank": lambda A, x, P: LowRankPlusDiag(x.exp(), U).inverse_diagonal().sin(),
    "blocks": lambda A, x, P: blocks(A, x).solve(x).sin(),
    "shape": lambda A, x, P: x * P.size + P.shape[0] + P.diagonal(),
    "factor": lambda A, x, P: P.factor().solve(x) + 1,
    "marginal": lambda A, x, P: built(A).marginal([0, 3]).solve(x[:2]).sin(),
    "inverse": lambda A, x, P: built(A).inverse() @ x,
    "sample": lambda A, x, P: built(A).sample((3,), torch.Generator().manual_seed(1)).sin(),
    "Phi @ v": lambda A, x, P: (ROWS @ x.sin()).cos(),
    "S @ Phi": lambda A, x, P: ((S.sin() @ ROWS) @ x).sin(),
    "gram": lambda A, x, P: LAYER.gram().sin() + x.sum(),
    "congruence": lambda A, x, P: built(A).inv_congruence(LAYER).sin(),
    "Gaussian": lambda A, x, P: Gaussian(x, P).log_prob(x.sin()) + Gaussian(x, built(A)).variance.sum(),
    "KL": lambda A, x, P: torch.distributions.kl_divergence(Gaussian(x, P), Gaussian(x.sin(), 2 * P)),
    "vmap": lambda A, x, P: torch.vmap(lambda c: KroneckerSum([(A, B)], shift=c).logdet())(x.exp()),
    "grad": lambda A, x, P: torch.func.grad(lambda A: built(A).logdet())(A).sin(),
}


def gradients(program: Program) -> tuple[Tensor | None, ...]:
    leaves = [t.clone().requires_grad_() for t in (A, x)]
    answer = program(*leaves, GIVEN)
    return torch.autograd.grad(answer.sum(), leaves, allow_unused=True)


def check(program: Program, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(program, backend=backend, dynamic=False)
    for _ in range(2):  # the second call runs what the first has compiled
        torch.testing.assert_close(compiled(A, x, GIVEN), program(A, x, GIVEN), rtol=1e-10, atol=1e-12)
    if not program(A.clone().requires_grad_(), x.clone().requires_grad_(), GIVEN).requires_grad:
        return
    for found, expected in zip(gradients(compiled), gradients(program), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_uncompiled(name: str, backend: str) -> None:
    """The tracing half of torch.compile, which decides what the code means."""
    check(PROGRAMS[name], backend)


@pytest.mark.slow  # calls the C++ compiler for every program
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_by_inductor_equals_uncompiled(name: str) -> None:
    check(PROGRAMS[name], "inductor")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_in_compiled_code(kind: str) -> None:
    case = make_case(kind, Spec(size=6, log10cond=2.0, spectrum="decay", seed=1))
    P, b = case.operator, randn(case.size, seed=9)

    def answer(P: PrecisionOperator, b: Tensor) -> Tensor:
        return P.logdet() + P.inv_quad(b.sin()) + P.solve(b).sin().sum() + (P @ b).cos().sum()

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(answer, backend="eager")(P, b), answer(P, b), rtol=1e-12, atol=0)


def test_errors_are_raised_as_they_are() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda A: Dense(A - 100).logdet() + 1, backend="eager")
    with pytest.raises(NotPositiveDefiniteError, match="Dense"):
        compiled(A)
