"""`torch.func` and `vmap` over operators give what eager autograd gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from curvlin import (
    BlockDiag,
    BlockFeatures,
    Dense,
    DenseFeatures,
    Diagonal,
    Gaussian,
    Isotropic,
    KroneckerSum,
    LowRankPlusDiag,
    NotClosedError,
    NotPositiveDefiniteError,
    SpectralKronecker,
)
from curvlin.precision.base import PrecisionOperator
from curvlin.testing import KINDS, Case, Spec, make_case

f64 = torch.float64
SPEC = Spec(size=6, log10cond=2.0, spectrum="rank-deficient", seed=1)
REPEATED = Spec(size=6, log10cond=0.0, spectrum="repeated", seed=2)

ANSWERS: dict[str, Callable[[PrecisionOperator, Tensor], Tensor]] = {
    "logdet": lambda P, b: P.logdet(),
    "solve": lambda P, b: P.solve(b).sin().sum(),
    "inv_quad": lambda P, b: P.inv_quad(b),
    "inverse_diagonal": lambda P, b: (P.inverse_diagonal() * b).sin().sum(),
    "trace_solve": lambda P, b: P.trace_solve(Diagonal(1 + b.square())),
}


def case_of(kind: str, spec: Spec = SPEC) -> Case:
    case = make_case(kind, spec)
    return make_case(kind, Spec(**{**vars(spec), "spectrum": "decay"})) if case.recipe.singular else case


def vector(case: Case, *batch: int) -> Tensor:
    return torch.randn(*batch, case.size, dtype=f64, generator=case.generator(5))


def differentiable(case: Case) -> tuple[int, ...]:
    return tuple(i for i, p in enumerate(case.recipe.parameters) if p.differentiable)


def function_of(case: Case, name: str, b: Tensor) -> Callable[..., Tensor]:
    """The answer as a function of the differentiable tensors only."""
    mine = differentiable(case)

    def fn(*tensors: Tensor) -> Tensor:
        everything = list(case.tensors)
        for i, t in zip(mine, tensors, strict=True):
            everything[i] = t
        return ANSWERS[name](case.rebuilt(everything), b)

    return fn


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    return tuple(case.tensors[i] for i in differentiable(case))


def eager_gradient(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(fn(*leaves), leaves)


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spec", [SPEC, REPEATED], ids=["rank-deficient", "repeated"])
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_func_grad_equals_eager(kind: str, name: str, spec: Spec) -> None:
    case = case_of(kind, spec)
    fn, inputs = function_of(case, name, vector(case)), inputs_of(case)
    close(grad(fn, argnums=tuple(range(len(inputs))))(*inputs), eager_gradient(fn, inputs))


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_grad_equals_a_loop(kind: str, name: str) -> None:
    batched = case_of(kind, Spec(**{**vars(SPEC), "batch": (3,)}))
    inputs, b = inputs_of(batched), vector(batched)
    mapped = vmap(grad(function_of(_element(batched), name, b), argnums=tuple(range(len(inputs)))))(*inputs)
    for i in range(3):
        fn = function_of(batched.single((i,)), name, b)
        close(tuple(g[i] for g in mapped), eager_gradient(fn, tuple(t[i] for t in inputs)))


def _element(batched: Case) -> Case:
    """An element to take the constants from: bases of a SpectralKronecker are not mapped over."""
    first = batched.single((0,))
    for i, p in enumerate(batched.recipe.parameters):
        if not p.differentiable:
            p.tensor[:] = p.tensor[0]
            assert torch.equal(first.tensors[i], p.tensor[1])
    return first


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_right_hand_sides(kind: str, name: str) -> None:
    case = case_of(kind)
    B = vector(case, 4)
    mapped = vmap(lambda b: ANSWERS[name](case.operator, b))(B)
    close(mapped, torch.stack([ANSWERS[name](case.operator, b) for b in B]))
    mapped = vmap(lambda b: ANSWERS[name](case.operator.factor(), b))(B)
    close(mapped, torch.stack([ANSWERS[name](case.operator, b) for b in B]))


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", ["dense", "kronecker_two", "low_rank_plus_diag", "block_diag"])
def test_vmap_over_the_operator_itself(kind: str, name: str) -> None:
    """An operator is a pytree, so it is an argument like any other."""
    batched = case_of(kind, Spec(**{**vars(SPEC), "batch": (3,)}))
    B = vector(batched, 3)
    mapped = vmap(ANSWERS[name])(batched.operator.expand((3,)), B)
    close(mapped, torch.stack([ANSWERS[name](batched.single((i,)).operator, B[i]) for i in range(3)]))
    gradients = vmap(grad(lambda P, b: ANSWERS[name](P, b)))(batched.operator.expand((3,)), B)
    assert type(gradients) is type(batched.operator)


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_hessian_equals_double_backward(kind: str, name: str) -> None:
    """With respect to the first tensor; forward over reverse, against reverse over reverse."""
    case = case_of(kind)
    fn, inputs = function_of(case, name, vector(case)), inputs_of(case)
    one = lambda t: fn(t, *inputs[1:])  # noqa: E731
    eager = torch.autograd.functional.hessian(one, inputs[0])
    close(hessian(one)(inputs[0]), eager)
    close(jacrev(jacrev(one))(inputs[0]), eager)


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_equals_reverse_mode(kind: str, name: str) -> None:
    case = case_of(kind)
    fn, inputs = function_of(case, name, vector(case)), inputs_of(case)
    tangents = tuple(torch.randn(t.shape, dtype=f64, generator=case.generator(6)) for t in inputs)
    _, forward = jvp(fn, inputs, tangents)
    _, pull = vjp(fn, *inputs)
    reverse = pull(torch.ones((), dtype=f64))
    close(forward, sum((g * t).sum() for g, t in zip(reverse, tangents, strict=True)))
    close(jacfwd(fn)(*inputs), reverse[0])


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_nested_vmap_equals_a_loop(kind: str, name: str) -> None:
    batched = case_of(kind, Spec(**{**vars(SPEC), "batch": (2, 3)}))
    inputs, b = inputs_of(batched), vector(batched)
    for i, p in enumerate(batched.recipe.parameters):
        if not p.differentiable:
            p.tensor[:] = batched.tensors[i][0, 0].clone()
    fn = function_of(batched.single((0, 0)), name, b)
    everything = tuple(range(len(inputs)))
    values = vmap(vmap(fn))(*inputs)
    gradients = vmap(vmap(grad(fn, argnums=everything)))(*inputs)
    for i, j in ((0, 0), (1, 2)):
        element = tuple(t[i, j] for t in inputs)
        close(values[i, j], fn(*element))
        close(tuple(g[i, j] for g in gradients), eager_gradient(fn, element))


# -- pairs of operators --------------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[PrecisionOperator, PrecisionOperator], Tensor]] = {
    "trace_solve": lambda P, Q: P.trace_solve(Q),
    "divergence": lambda P, Q: kl_divergence(*(Gaussian(torch.zeros(R.size, dtype=f64), R) for R in (P, Q))),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("other", ["kronecker_shifted", "kronecker_repeated", "spectral_kronecker"])
@pytest.mark.parametrize("kind", [k for k in KINDS if "kronecker" in k])
def test_pairs_of_kronecker_operators_under_transforms(kind: str, other: str, name: str) -> None:
    pair = [case_of(k, Spec(**{**vars(SPEC), "batch": (3,)})) for k in (kind, other)]
    P, Q = (case.operator.expand((3,)) for case in pair)
    singles = [[case.single((i,)).operator for case in pair] for i in range(3)]
    close(vmap(PAIRS[name])(P, Q), torch.stack([PAIRS[name](*each) for each in singles]))

    def fn(x: Tensor, y: Tensor, p: PrecisionOperator, q: PrecisionOperator) -> Tensor:
        return PAIRS[name]((1 + x) * p, (1 + y) * q)

    here = torch.tensor([0.1, 0.2, 0.3], dtype=f64)
    first = vmap(grad(fn, argnums=(0, 1)))(here, here, P, Q)
    for i, each in enumerate(singles):
        eager = eager_gradient(lambda x, y: fn(x, y, *each), (here[i], here[i]))  # noqa: B023
        close(tuple(g[i] for g in first), eager)
    p, q = singles[0]
    close(
        hessian(lambda x: fn(x[0], x[1], p, q))(here),
        torch.autograd.functional.hessian(lambda x: fn(x[0], x[1], p, q), here),
    )


@pytest.mark.parametrize("name", PAIRS)
def test_hessian_in_the_factors_of_both_equals_double_backward(name: str) -> None:
    A, B, C, E = (make_case("dense", Spec(size=n, seed=n + i)).matrix for i, n in enumerate((2, 3, 2, 3)))

    def fn(x: Tensor) -> Tensor:
        a, b, c, e = (t.reshape(M.shape) for t, M in zip(x.split([4, 9, 4, 9]), (A, B, C, E), strict=True))
        a, b, c, e = ((M + M.mT) / 2 for M in (a, b, c, e))
        return PAIRS[name](KroneckerSum.shifted(a, b, 0.1), KroneckerSum([(c, b), (a, e)]))

    x = torch.cat([M.flatten() for M in (A, B, C, E)])
    eager = torch.autograd.functional.hessian(fn, x)
    close(hessian(fn)(x), eager)
    close(jacrev(jacfwd(fn))(x), eager)


def test_spectral_sums_under_vmap_need_a_shared_basis() -> None:
    """The same tensors are one basis; whether two mapped tensors are equal cannot be seen."""
    batched = make_case("spectral_kronecker", Spec(size=6, batch=(3,), seed=4)).operator
    other = batched.with_eigenvalues(batched.eigenvalues + 1)

    def total(P: SpectralKronecker, more: Tensor) -> Tensor:
        return (P + P.with_eigenvalues(more)).logdet()

    close(vmap(total)(batched, other.eigenvalues), (batched + other).logdet())
    with pytest.raises(NotClosedError, match="project"):
        vmap(lambda P, Q: (P + Q).logdet())(batched, other)
    one = SpectralKronecker(batched.QL[0], batched.QR[0], batched.eigenvalues[0])
    clone = SpectralKronecker(one.QL.clone(), one.QR.clone(), one.eigenvalues)
    values = vmap(lambda e: (one.with_eigenvalues(e) + clone.with_eigenvalues(e)).logdet())(
        batched.eigenvalues
    )
    close(values, torch.stack([one.with_eigenvalues(2 * e).logdet() for e in batched.eigenvalues]))


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad_of_samples(kind: str) -> None:
    case = case_of(kind)
    z, inputs = vector(case, 2), inputs_of(case)
    mine = differentiable(case)

    def fn(*tensors: Tensor) -> Tensor:
        everything = list(case.tensors)
        for i, t in zip(mine, tensors, strict=True):
            everything[i] = t
        # Roots are not unique; a function of F F^T is.
        return (
            case.rebuilt(everything).unwhiten(torch.eye(6, dtype=f64)).square().sum(0).sin().sum()
            + 0 * z.sum()
        )

    differentiate = grad(fn, argnums=tuple(range(len(inputs))))
    if not case.recipe.differentiable_roots:
        with pytest.raises(NotClosedError, match="no derivative"):
            differentiate(*inputs)
        return
    close(differentiate(*inputs), eager_gradient(fn, inputs))


@pytest.mark.parametrize("kind", ["dense", "kronecker_shifted", "low_rank_plus_diag", "spectral_kronecker"])
@pytest.mark.parametrize("transform", [vmap, lambda fn: vmap(grad(fn)), lambda fn: vmap(jacfwd(fn))])
def test_inside_transforms_an_indefinite_operator_never_answers(
    kind: str, transform: Callable[..., Any]
) -> None:
    """It raises where values can be seen and is NaN where they cannot; it is never a number that looks right."""
    case = case_of(kind, Spec(size=6, log10cond=1.0))
    which = differentiable(case)[0]
    good = case.tensors[which]
    worse = good - 3 * good.abs().amax() * (
        torch.eye(good.shape[-1], dtype=f64) if case.recipe.parameters[which].symmetric else 1.0
    )

    def fn(t: Tensor) -> Tensor:
        tensors = list(case.tensors)
        tensors[which] = t
        return case.rebuilt(tensors).logdet()

    assert bool(transform(fn)(torch.stack([good, good])).isfinite().all())
    try:
        values = transform(fn)(torch.stack([good, worse]))
    except NotPositiveDefiniteError:
        return
    assert bool(values[0].isfinite().all())
    assert bool(values[1].isnan().all())


# -- indices ------------------------------------------------------------------------------------------------------


def _interleaved(A: Tensor) -> BlockDiag:
    return BlockDiag([Dense(A), Diagonal(A.diagonal())], [torch.tensor([3, 0, 4]), torch.tensor([1, 5, 2])])


def _nested(A: Tensor) -> PrecisionOperator:
    """The sum of two partitions, one finer than the other."""
    blocks = [Isotropic(A[0, 0], 2), Dense(A[:1, :1])]
    return _interleaved(A) + BlockDiag([*blocks, *blocks], [[4, 3], [0], [1, 2], torch.tensor([5])])


USES_OF_INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "blocks": lambda A: _interleaved(A).logdet(),
    "blocks, int32": lambda A: BlockDiag([Dense(A)], [torch.tensor([2, 0, 1], dtype=torch.int32)]).logdet(),
    "marginal of blocks": lambda A: _interleaved(A).marginal(torch.tensor([5, 0, 3, 2])).logdet(),
    "conditional of blocks": lambda A: _interleaved(A).conditional([5, 0, 3, 2]).logdet(),
    "nested partitions": lambda A: _nested(A).logdet(),
    "projection": lambda A: _nested(A).project(BlockDiag, indices=[[0, 2, 4], [1, 3, 5]]).operator.logdet(),
    "dense": lambda A: Dense(A).marginal([2, 0]).logdet() + Dense(A).conditional(slice(1, 3)).logdet(),
    "diagonal": lambda A: Diagonal(A.diagonal()).marginal(torch.tensor([2, 0])).logdet(),
    "Kronecker": lambda A: KroneckerSum([(A, A)]).marginal(torch.tensor([0, 1, 3, 4])).logdet(),
    "low rank": lambda A: LowRankPlusDiag(A.diagonal(), A).marginal(torch.tensor([2, 0])).logdet(),
    "Gaussian": lambda A: Gaussian(A[0], Dense(A)).conditional([1], A[1, :2]).mean.sum(),
    "columns": lambda A: DenseFeatures(A[None]).columns([0, 2]).sum(),
    "columns of blocks": lambda A: (
        BlockFeatures([DenseFeatures(A[None]), DenseFeatures(A[None])], [[3, 0, 4], torch.tensor([1, 5, 2])])
        .columns(torch.tensor([4, 1, 0]))
        .square()
        .sum()
    ),
}


@pytest.mark.parametrize("use", USES_OF_INDICES)
def test_indices_may_be_made_inside_a_transform(use: str) -> None:
    """A transform wraps every tensor that is made inside it, also those that it does not transform."""
    fn = USES_OF_INDICES[use]
    A = torch.tensor([[3.0, 0.5, 0.2], [0.5, 2.0, 0.1], [0.2, 0.1, 1.0]], dtype=f64)
    (expected,) = eager_gradient(fn, (A,))
    close(grad(fn)(A), expected)
    close(jacfwd(fn)(A), expected)
    batch = torch.stack([A, 2 * A])
    close(vmap(grad(fn))(batch)[0], expected)
    close(grad(lambda B: vmap(fn)(B).sum())(batch)[0], expected)


@pytest.mark.parametrize("wrap", [lambda fn: fn, grad], ids=["vmap", "vmap of grad"])
def test_an_index_that_differs_over_a_batch_is_refused(wrap: Callable[..., Any]) -> None:
    """Structure is shared over a batch."""
    A, index = torch.eye(3, dtype=f64), torch.tensor([[0, 1], [1, 2]])
    fine, coarse = torch.tensor([[0], [1]]), torch.tensor([[1, 2], [0, 2]])
    for fn, indices in (
        (lambda A, i: Dense(A).marginal(i).logdet(), (index,)),
        (lambda A, i, j: BlockDiag([Dense(A[:1, :1]), Dense(A[1:, 1:])], [i, j]).logdet(), (fine, coarse)),
    ):
        with pytest.raises(TypeError, match="must be the same for all elements of a vmap"):
            vmap(wrap(fn), in_dims=(None, *(0 for _ in indices)))(A, *indices)
