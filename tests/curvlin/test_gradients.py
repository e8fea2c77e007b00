"""Derivatives of every answer with respect to every tensor, to second order, repeated eigenvalues included.

`gradcheck` compares with finite differences; the law "gradients" (in `test_laws`) with the dense formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import kl_divergence

from curvlin import Dense, Diagonal, Gaussian, KroneckerSum, LowRankPlusDiag, NotClosedError, Woodbury
from curvlin.precision.base import PrecisionOperator
from curvlin.testing import KINDS, LAWS, Case, Spec, make_case

f64 = torch.float64
Function = Callable[..., Tensor]

SPECS = {
    "decay": Spec(size=4, log10cond=1.0, seed=1),
    "equal eigenvalues": Spec(size=4, log10cond=0.0, spectrum="repeated", seed=2),
    "repeated eigenvalue": Spec(size=6, log10cond=1.0, spectrum="repeated", seed=3),
    "rank-deficient parts": Spec(size=6, log10cond=1.0, spectrum="rank-deficient", seed=4),
}


ROOTS = ("sample", "root_matvec")


def differentiable(case: Case) -> list[str]:
    """The questions that have derivatives for this case."""
    return [q for q in questions(case) if case.recipe.differentiable_roots or q not in ROOTS]


def questions(case: Case) -> dict[str, Callable[[PrecisionOperator, Tensor], Tensor]]:
    z = torch.randn(2, case.size, dtype=f64, generator=case.generator(1))
    return {
        "logdet": lambda P, b: P.logdet(),
        "solve": lambda P, b: P.solve(b),
        "inv_quad": lambda P, b: P.inv_quad(b),
        "inv_congruence": lambda P, b: P.inv_congruence(torch.stack([b, z[0]])),
        "inverse_diagonal": lambda P, b: P.inverse_diagonal(),
        "sample": lambda P, b: P.unwhiten(z),
        "root_matvec": lambda P, b: P.root_matvec(z),
        "product": lambda P, b: P @ b,
    }


def function_and_inputs(case: Case, question: str) -> tuple[Function, list[Tensor]]:
    """The question as a function of all tensors; symmetric ones are symmetrised inside."""
    ask = questions(case)[question]
    mask = [p.differentiable for p in case.recipe.parameters]
    b = torch.randn(case.size, dtype=f64, generator=case.generator(2))
    inputs = [t.clone().requires_grad_(m) for t, m in zip(case.tensors, mask, strict=True)]

    def fn(*tensors: Tensor) -> Tensor:
        return ask(case.rebuilt(tensors[:-1]), tensors[-1])

    return fn, [*inputs, b.requires_grad_()]


def _case(kind: str, spec: str) -> Case:
    case = make_case(kind, SPECS[spec])
    if case.recipe.singular:
        pytest.skip("this kind has no inverse at a rank-deficient spectrum")
    return case


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_first_derivatives(kind: str, spec: str) -> None:
    """Random directions of all inputs and outputs; entry by entry in the slow suite."""
    case = _case(kind, spec)
    for question in differentiable(case):
        fn, inputs = function_and_inputs(case, question)
        assert gradcheck(fn, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True), question


@pytest.mark.parametrize("spec", ["equal eigenvalues", "rank-deficient parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str, spec: str) -> None:
    """Of all at once; one by one in the slow suite, and against the dense formula in the law "gradients"."""
    case = _case(kind, spec)
    names = [q for q in differentiable(case) if q not in ("root_matvec", "product")]
    parts = [function_and_inputs(case, q)[0] for q in names]
    _, inputs = function_and_inputs(case, "logdet")

    def together(*tensors: Tensor) -> Tensor:
        return torch.cat([part(*tensors).flatten() for part in parts])

    assert gradgradcheck(together, inputs, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("question", list(questions(make_case("isotropic", Spec(size=2)))))
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_entry_by_entry(kind: str, spec: str, question: str) -> None:
    case = _case(kind, spec)
    if question not in differentiable(case):
        pytest.skip("roots of this kind have no derivative")
    fn, inputs = function_and_inputs(case, question)
    assert gradcheck(fn, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)
    if question not in ("root_matvec", "product"):
        assert gradgradcheck(fn, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("isotropic", "diagonal")])
def test_gradients_at_repeated_eigenvalues_equal_those_of_the_dense_formula(kind: str) -> None:
    """Every factor a multiple of the identity: the usual initial state, where autograd through eigh gives NaN."""
    LAWS["gradients"](make_case(kind, Spec(size=6, log10cond=0.0, spectrum="step", seed=5)))


# -- pairs of operators --------------------------------------------------------------------------------------------

KRONECKER = [k for k in KINDS if "kronecker" in k]
PAIR_QUESTIONS: dict[str, tuple[Function, Function]] = {
    "trace_solve": (lambda P, Q: P.trace_solve(Q), lambda M, N: (torch.linalg.inv(M) * N).sum()),
    "divergence": (
        lambda P, Q: kl_divergence(*(Gaussian(torch.zeros(R.size, dtype=f64), R) for R in (P, Q))),
        lambda M, N: ((torch.linalg.inv(M) * N).sum() - len(M) + torch.logdet(M) - torch.logdet(N)) / 2,
    ),
}


def first_and_second(case: Sequence[Case], fn: Callable[[list[list[Tensor]]], Tensor]) -> list[Tensor]:
    """A value, its gradients, and its Hessian times a direction in which nothing commutes."""
    leaves = [
        [
            t.clone().requires_grad_(p.differentiable)
            for t, p in zip(c.tensors, c.recipe.parameters, strict=True)
        ]
        for c in case
    ]
    inputs = [t for each in leaves for t in each if t.requires_grad]
    value = fn(leaves)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(value.shape, dtype=f64, generator=generator)
    first = torch.autograd.grad((weights * value).sum(), inputs, create_graph=True)
    slope = sum((torch.randn(g.shape, dtype=f64, generator=generator) * g).sum() for g in first)
    second = torch.autograd.grad(slope, inputs, materialize_grads=True)
    return [value, *first, *second]


@pytest.mark.parametrize("question", PAIR_QUESTIONS)
@pytest.mark.parametrize("kind", KRONECKER)
def test_derivatives_in_both_operators(kind: str, question: str) -> None:
    """Of P and Q of every pair of Kronecker kinds, with equal eigenvalues and with rank-deficient factors."""
    ours, dense = PAIR_QUESTIONS[question]
    for other in KRONECKER:
        for spec in ("equal eigenvalues", "rank-deficient parts"):
            pair = [make_case(k, SPECS[spec]) for k in (kind, other)]
            if any(case.recipe.singular for case in pair):
                continue

            def of_operators(leaves: list[list[Tensor]], pair: list[Case] = pair) -> Tensor:
                return ours(*(case.rebuilt(each) for case, each in zip(pair, leaves, strict=True)))

            def of_matrices(leaves: list[list[Tensor]], pair: list[Case] = pair) -> Tensor:
                return dense(*(case.dense(each) for case, each in zip(pair, leaves, strict=True)))

            found, expected = first_and_second(pair, of_operators), first_and_second(pair, of_matrices)
            for mine, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9, msg=f"{other}, {spec}")


@pytest.mark.parametrize("other", ["diagonal", "isotropic", "low_rank_plus_diag"])
@pytest.mark.parametrize("kind", KRONECKER)
def test_derivatives_of_a_trace_with_other_structures(kind: str, other: str) -> None:
    for spec in ("equal eigenvalues", "rank-deficient parts"):
        P = make_case(kind, SPECS[spec])
        Q = make_case(other, Spec(size=P.size, seed=5))
        if P.recipe.singular:
            continue
        found = first_and_second([P, Q], lambda x: P.rebuilt(x[0]).trace_solve(Q.rebuilt(x[1])))  # noqa: B023
        exact = first_and_second([P, Q], lambda x: (torch.linalg.inv(P.dense(x[0])) * Q.dense(x[1])).sum())  # noqa: B023
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "low_rank_plus_diag", "downdated", "kronecker_two", "block_diag"])
def test_the_batch_of_an_update_broadcasts_against_its_base(kind: str) -> None:
    """The determinant of the base has no batch, its derivatives have that of the columns."""
    P = make_case(kind, Spec(size=6, seed=1))
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    leaves = [*P.tensors, make_case("dense", Spec(size=6, seed=2, batch=(3,))).matrix[..., :2]]

    def found(*leaves: Tensor) -> Tensor:
        logdet = Woodbury(P.rebuilt(leaves[:-1]), leaves[-1]).logdet()
        assert logdet.shape == (3,)
        return (logdet * weights).sum()

    def right(*leaves: Tensor) -> Tensor:
        return ((P.dense(leaves[:-1]) + leaves[-1] @ leaves[-1].mT).logdet() * weights).sum()

    derivatives = []
    for total in (found, right):
        live = [t.clone().requires_grad_() for t in leaves]
        first = torch.autograd.grad(total(*live), live, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), live)
        derivatives.append([*first, *second])
    torch.testing.assert_close(*derivatives, rtol=1e-9, atol=1e-9)
    hessians = [torch.func.hessian(total)(*leaves) for total in (found, right)]
    torch.testing.assert_close(*hessians, rtol=1e-9, atol=1e-9)


def test_a_divergence_between_batches_has_the_derivatives_of_its_elements() -> None:
    """The batch of one operator broadcasts against that of a single factor of the other."""
    A, C = (make_case("dense", Spec(size=2, seed=s)).matrix for s in (1, 2))
    B, E = (make_case("dense", Spec(size=3, seed=s, batch=(4,))).matrix for s in (3, 4))
    together = [t.clone().requires_grad_() for t in (A, B, C, E)]

    def divergence(A: Tensor, B: Tensor, C: Tensor, E: Tensor) -> Tensor:
        zero = torch.zeros(6, dtype=f64)
        P, Q = KroneckerSum.shifted(A, B, 0.1), KroneckerSum([(C, B), (A, E)])
        return kl_divergence(Gaussian(zero, P), Gaussian(zero, Q)) + P.inverse_diagonal().square().sum(-1)

    found = torch.autograd.grad(divergence(*together).sum(), together)
    apart = [t.clone().requires_grad_() for t in (A, B, C, E)]
    total = sum(divergence(apart[0], apart[1][i], apart[2], apart[3][i]) for i in range(4))
    torch.testing.assert_close(found, torch.autograd.grad(total, apart), rtol=1e-9, atol=1e-10)


# -- with respect to what ------------------------------------------------------------------------------------------


def test_gradient_of_logdet_is_the_inverse() -> None:
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=f64, requires_grad=True)
    Dense(A).logdet().backward()
    torch.testing.assert_close(A.grad, torch.linalg.inv(A.detach()), rtol=1e-14, atol=0.0)


def test_gradient_of_logdet_of_a_product_is_the_inverse_of_each_factor() -> None:
    """log det(A (x) B) = b log det A + a log det B."""
    A, B = (make_case("dense", Spec(size=n, seed=n)).matrix.clone().requires_grad_() for n in (2, 3))
    KroneckerSum([(A, B)]).logdet().backward()
    torch.testing.assert_close(A.grad, 3 * torch.linalg.inv(A.detach()), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(B.grad, 2 * torch.linalg.inv(B.detach()), rtol=1e-12, atol=0.0)


def test_gradient_of_low_rank_logdet_is_closed_form() -> None:
    """dU = 2 P^-1 U and dd = diag(P^-1)."""
    case = make_case("low_rank_plus_diag", Spec(size=8, seed=3))
    d, U = (t.clone().requires_grad_() for t in case.tensors)
    LowRankPlusDiag(d, U).logdet().backward()
    inverse = torch.linalg.inv(case.matrix)
    torch.testing.assert_close(U.grad, 2 * inverse @ U.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(d.grad, inverse.diagonal(), rtol=1e-11, atol=0.0)


def test_a_batch_has_the_gradients_of_its_elements() -> None:
    spec = Spec(size=6, batch=(3,), mixed=True, seed=6)
    for kind in KINDS:
        case = make_case(kind, spec)
        mask = [p.differentiable for p in case.recipe.parameters]
        together = [t.clone().requires_grad_(m) for t, m in zip(case.tensors, mask, strict=True)]
        apart = [t.clone().requires_grad_(m) for t, m in zip(case.tensors, mask, strict=True)]
        z = torch.randn(6, dtype=f64)

        def total(
            P: PrecisionOperator, z: Tensor = z, smooth: bool = case.recipe.differentiable_roots
        ) -> Tensor:
            roots = P.unwhiten(z).square().sum(-1) if smooth else 0.0
            return (P.logdet() + P.inv_quad(z) + roots).sum()

        total(case.rebuilt(together)).backward()
        for i in range(3):
            one = [t[i] if t.ndim > p.ndim else t for t, p in zip(apart, case.recipe.parameters, strict=True)]
            total(case.rebuilt(one)).backward()
        for x, y in zip(together, apart, strict=True):
            if x.requires_grad:
                torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11, msg=kind)


def test_float32_gradients_come_back_in_float32() -> None:
    A = torch.eye(3, requires_grad=True)
    d = torch.ones((), requires_grad=True)
    P = KroneckerSum.shifted(A, torch.eye(2), d)
    (P.logdet() + P.sample(generator=torch.Generator().manual_seed(0)).sum()).backward()
    assert A.grad is not None and A.grad.dtype == torch.float32
    assert d.grad is not None and d.grad.dtype == torch.float32


@pytest.mark.parametrize("question", ["logdet", "inverse_diagonal", "trace_solve"])
@pytest.mark.parametrize("kind", ["kronecker_shifted", "kronecker_two", "dense"])
def test_third_order_is_refused_or_right_but_never_wrong(kind: str, question: str) -> None:
    """In directions that do not commute with the factors, where a basis held fixed would notice."""
    case = make_case(kind, Spec(size=4, log10cond=1.0, seed=7))
    Q = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=f64))
    ours, dense = {
        "logdet": (lambda P: P.logdet(), torch.logdet),
        "inverse_diagonal": (
            lambda P: P.inverse_diagonal().square().sum(),
            lambda M: torch.linalg.inv(M).diagonal().square().sum(),
        ),
        "trace_solve": (
            lambda P: P.trace_solve(Diagonal(Q.diagonal())),
            lambda M: (torch.linalg.inv(M) * Q).sum(),
        ),
    }[question]

    def third(fn: Callable[[list[Tensor]], Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in case.tensors]
        generator = torch.Generator().manual_seed(1)
        value = fn(leaves)
        for _ in range(2):
            slopes = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g * torch.randn(g.shape, dtype=f64, generator=generator)).sum() for g in slopes)
        return torch.autograd.grad(value, leaves)

    exact = third(lambda leaves: dense(case.dense(leaves)))
    try:
        found = third(lambda leaves: ours(case.rebuilt(leaves)))
    except (RuntimeError, NotClosedError) as error:
        assert "\n" not in str(error)
        return
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


# -- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_is_built_where_none_is_wanted(kind: str) -> None:
    case = make_case(kind, Spec(size=6, seed=8))
    leaves = [
        t.clone().requires_grad_(p.differentiable)
        for t, p in zip(case.tensors, case.recipe.parameters, strict=True)
    ]
    P = case.rebuilt(leaves)
    with torch.no_grad():
        answers = [P.logdet(), P.solve(torch.ones(6, dtype=f64)), P.sample(), P.inverse_diagonal()]
    assert not any(a.requires_grad for a in answers)
    assert P.logdet().requires_grad
    assert not P.detach().logdet().requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_factored_operator_has_the_same_gradients(kind: str) -> None:
    case = make_case(kind, Spec(size=6, log10cond=2.0, seed=9))
    gradients = []
    for factored in (False, True):
        leaves = [
            t.clone().requires_grad_(p.differentiable)
            for t, p in zip(case.tensors, case.recipe.parameters, strict=True)
        ]
        P = case.rebuilt(leaves)
        P = P.factor() if factored else P
        z = torch.ones(6, dtype=f64)
        value = P.logdet() + P.inv_quad(z) + P.solve(z).sum()
        if case.recipe.differentiable_roots:
            value = value + P.unwhiten(z).square().sum()
        gradients.append(torch.autograd.grad(value, [t for t in leaves if t.requires_grad]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_follow_an_edit_in_place() -> None:
    """No value computed before the edit is reused."""
    d = torch.tensor([1.0, 2.0], dtype=f64, requires_grad=True)
    P = Diagonal(d)
    P.logdet().backward()
    with torch.no_grad():
        d.mul_(2.0)
    d.grad = None
    value = P.logdet()
    value.backward()
    assert float(value.detach()) == pytest.approx(float(torch.tensor([2.0, 4.0]).log().sum()))
    torch.testing.assert_close(d.grad, torch.tensor([0.5, 0.25], dtype=f64))


# -- gradients where the right-hand side lies in the range of U ------------------------------------------------------


@pytest.mark.parametrize("log10cond", [6.0, 10.0])
def test_gradients_in_the_range_of_the_update_are_as_good_as_dense_ones(log10cond: float) -> None:
    """``d(b^T P^-1 b) = -2 x t^T`` in U with ``t = U^T x``, small beside ``|U| |x|`` there; truth in 50 digits."""
    size, rank = 16, 3
    d = torch.logspace(0, -log10cond, size, dtype=torch.float64)
    ours, dense = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        U = torch.randn(size, rank, dtype=torch.float64, generator=generator).requires_grad_()
        b = U.detach() @ torch.randn(rank, dtype=torch.float64, generator=generator)
        with mpmath.workdps(50):
            columns = mpmath.matrix(U.tolist())
            x = mpmath.lu_solve(
                mpmath.diag([mpmath.mpf(v) for v in d.tolist()]) + columns * columns.T, b.tolist()
            )
            product = -2 * x * (columns.T * x).T
            truth = torch.tensor(
                [[float(product[i, j]) for j in range(rank)] for i in range(size)], dtype=torch.float64
            )
        lower = torch.linalg.cholesky(torch.diag(d) + U @ U.mT)
        plain = torch.linalg.solve_triangular(lower, b[:, None], upper=False).square().sum()
        for value, errors in ((LowRankPlusDiag(d, U).inv_quad(b), ours), (plain, dense)):
            (gradient,) = torch.autograd.grad(value, U)
            errors.append(float((gradient - truth).norm() / truth.norm()))
    assert sum(ours) < 1.5 * sum(dense)
