"""`torch.func` and `vmap` over operators give what eager autograd gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from curvlin import NotClosedError, NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator
from curvlin.testing import KINDS, Case, Spec, make_case

f64 = torch.float64
SPEC = Spec(size=6, log10cond=2.0, spectrum="rank-deficient", seed=1)
REPEATED = Spec(size=6, log10cond=0.0, spectrum="repeated", seed=2)

ANSWERS: dict[str, Callable[[PrecisionOperator, Tensor], Tensor]] = {
    "logdet": lambda P, b: P.logdet(),
    "solve": lambda P, b: P.solve(b).sin().sum(),
    "inv_quad": lambda P, b: P.inv_quad(b),
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
