"""Gradients of solves, quadratic forms and log-determinants by implicit differentiation.

An operator that uses this module says two things: its product ``P @ X`` by plain differentiable operations, and
*values* (`_solve_value`, ...) computed from a factorisation that is a constant of the calculus. With ``x = P^-1 b``,

    d(P^-1 b)     = P^-1 (db - dP x)
    d(b^T P^-1 b) = 2 x^T db - x^T dP x
    d(log det P)  = tr(P^-1 dP)

so no derivative of an eigenvector is ever taken, repeated eigenvalues are harmless, and since the backward formulas
are written with the same differentiable functions, every order of derivative follows. (`log_det` asks the
operator for ``tr(P^-1 dP)`` as `_logdet_gradient`, and has the orders that this has.)

Autograd sees an operator as its tensors. `frozen_factors` is the one kernel that looks at values; it has a
`vmap` rule of its own, so under transforms the checks and algorithm switches inside a factorisation still see
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import Structure, Tree, build, hide_from_compiler, needs_grad, tensor_field
from curvlin.errors import NotClosedError


def solve(P: Any, X: Tensor, factors: Any) -> Tensor:
    """``P^-1 X`` for ``X`` of shape ``(..., D, K)``."""
    if not (P._needs_grad() or needs_grad(X)):
        value: Tensor = P._solve_value(X, factors)
        return value
    return apply_kernel(_Solve, P, factors, X)


def inv_quad(P: Any, X: Tensor, factors: Any) -> Tensor:
    """``x^T P^-1 x`` of each column of ``X``: ``(..., D, K) -> (..., K)``."""
    if not (P._needs_grad() or needs_grad(X)):
        value: Tensor = P._inv_quad_value(X, factors)
        return value
    quad: Tensor = apply_kernel(_InvQuad, P, factors, X)[0]
    return quad


def log_det(P: Any, factors: Any) -> Tensor:
    """``log det P``."""
    if not P._needs_grad():
        value: Tensor = P._logdet_value(factors)
        return value
    return apply_kernel(_LogDet, P, factors, None)


def graft(value: Tensor, expression: Tensor) -> Tensor:
    """`value` with the derivatives of `expression`: two ways to compute one thing, each for what it is good at."""
    value = value.expand(torch.broadcast_shapes(value.shape, expression.shape))
    result: Tensor = _Graft.apply(value, expression)  # type: ignore[no-untyped-call]
    return result


def without_derivative(value: Tensor, tensors: Sequence[Tensor], why: str) -> Tensor:
    """`value`, for which a derivative with respect to the tensors raises NotClosedError, and only that."""
    result: Tensor = _WithoutDerivative.apply(why, value, *tensors)  # type: ignore[no-untyped-call]
    return result


def factorize(P: Any) -> Any:
    """The factors of P as constants: no derivative of any order flows through them."""
    if P._is_concrete():
        with torch.no_grad():
            return P.detach()._factorize()
    return frozen_factors(P)


@dataclass(eq=False, repr=False)
class Factored(Tree):
    """An operator beside its factors, so that kernels take both apart in one go."""

    operator: Any = tensor_field(0)
    factors: Any = tensor_field(0)


def apply_kernel(function: Any, P: Any, factors: Any, X: Tensor | None) -> Any:
    """Run a kernel on the tensors of P, of its factors, and of a right-hand side."""
    pair = Factored(P, factors)
    return function.apply(pair._structure(), X, *(t for t, _ in pair._tensors()))


def pull_back(
    pair: Factored, wanted: Sequence[bool], fn: Callable[[Any], Tensor], cotangent: Tensor
) -> list[Tensor | None]:
    """Gradients of ``<cotangent, fn(P)>`` for the tensors of the pair that are wanted; the factors have none."""
    structure, leaves = pair.operator._structure(), [t for t, _ in pair.operator._tensors()]
    want = list(wanted[: len(leaves)])
    if not any(want):
        return [None] * len(wanted)
    of_chosen, chosen = _of_some(structure, leaves, want, fn)
    output, vjp = torch.func.vjp(of_chosen, *chosen)[:2]
    gradients = list(vjp(cotangent.expand_as(output)))
    padding = [None] * (len(wanted) - len(leaves))
    return [*(gradients.pop(0) if w else None for w in want), *padding]


def push_forward(
    pair: Factored, tangents: Sequence[Tensor | None], fn: Callable[[Any], Tensor]
) -> Tensor | None:
    """The directional derivative of ``fn(P)`` along the tangents of P's tensors, or None if there are none."""
    structure, leaves = pair.operator._structure(), [t for t, _ in pair.operator._tensors()]
    tangents = tangents[: len(leaves)]
    moving = [t is not None for t in tangents]
    if not any(moving):
        return None
    of_moving, primals = _of_some(structure, leaves, moving, fn)
    derivative: Tensor = directional(of_moving, primals, tuple(t for t in tangents if t is not None))
    return derivative


def _of_some(
    structure: Structure, leaves: Sequence[Tensor], some: Sequence[bool], fn: Callable[[Any], Tensor]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """``fn(P)`` as a function of some of P's tensors, and these."""

    def of_these(*tensors: Tensor) -> Tensor:
        queue = iter(tensors)
        return fn(
            build(structure, [next(queue) if s else leaf for leaf, s in zip(leaves, some, strict=True)])
        )

    return of_these, tuple(leaf for leaf, s in zip(leaves, some, strict=True) if s)


def directional(function: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Any:
    """The derivative of a function at some tensors along others, forwards."""
    # Forward mode gives a tangent the strides of its tensor, and cannot write to one that was expanded.
    return torch.func.jvp(function, tuple(t.contiguous() for t in at), along)[1]


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """What a kernel saved, out of the wrappers of transforms that have ended: a backward pass may outlive them.

    Left on, such a wrapper is taken for one of the next transform, and `pull_back` begins one.
    """
    return tuple(torch._C._functorch.unwrap_if_dead(t) for t in ctx.saved_tensors)


def sum_of(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], start=present[0]) if present else None


@hide_from_compiler
class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(structure: Structure, X: Tensor, *tensors: Tensor) -> Tensor:
        pair = build(structure, tensors)
        value: Tensor = pair.operator._solve_value(X, pair.factors)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, X, *tensors = inputs
        ctx.x_shape = X.shape
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        solution, *tensors = saved(ctx)
        pair = build(ctx.structure, tensors)
        Y = solve(pair.operator, G, pair.factors)
        grads = pull_back(pair, ctx.needs_input_grad[2:], lambda P: P._matmul(solution), -Y)
        return None, (Y.sum_to_size(ctx.x_shape) if ctx.needs_input_grad[1] else None), *grads

    @staticmethod
    def jvp(ctx: Any, _: Any, dX: Tensor | None, *tangents: Tensor | None) -> Tensor:
        solution, *tensors = saved(ctx)
        pair = build(ctx.structure, tensors)
        change = push_forward(pair, tangents, lambda P: -P._matmul(solution))
        right = sum_of(dX, change)
        assert right is not None
        return solve(pair.operator, right.expand_as(solution), pair.factors)


@hide_from_compiler
class _InvQuad(torch.autograd.Function):
    """The quadratic form, and the solution that it is made from: what a first derivative needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(structure: Structure, X: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        pair = build(structure, tensors)
        both: tuple[Tensor, Tensor] = pair.operator._inv_quad_and_solution(X, pair.factors)
        return both

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.structure, X, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], X, *tensors)
        ctx.save_for_forward(X, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
        solution, X, *tensors = saved(ctx)
        pair = build(ctx.structure, tensors)
        if torch.is_grad_enabled():  # to be differentiated again
            solution = solve(pair.operator, X, pair.factors)
        # -x^T P x with x held fixed has the derivative of the quadratic form with respect to P.
        grads = pull_back(
            pair, ctx.needs_input_grad[2:], lambda P: -P._energy_of(solution, X, pair.factors), g
        )
        grad_x = (2 * g.unsqueeze(-2) * solution).sum_to_size(X.shape) if ctx.needs_input_grad[1] else None
        return None, grad_x, *grads

    @staticmethod
    def jvp(ctx: Any, _: Any, dX: Tensor | None, *tangents: Tensor | None) -> tuple[Tensor, None]:
        X, *tensors = saved(ctx)
        pair = build(ctx.structure, tensors)
        solution = solve(pair.operator, X, pair.factors)
        change = push_forward(pair, tangents, lambda P: -P._energy_of(solution, X, pair.factors))
        total = sum_of(None if dX is None else 2 * (solution * dX).sum(-2), change)
        assert total is not None
        return total, None


@hide_from_compiler
class _LogDet(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(structure: Structure, _: None, *tensors: Tensor) -> Tensor:
        pair = build(structure, tensors)
        value: Tensor = pair.operator._logdet_value(pair.factors)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        pair = build(ctx.structure, saved(ctx))
        grads = pair.operator._logdet_pull_back(g, pair.factors)
        return None, None, *grads, *([None] * (len(ctx.needs_input_grad) - 2 - len(grads)))

    @staticmethod
    def jvp(ctx: Any, _: Any, _x: None, *tangents: Tensor | None) -> Tensor:
        pair = build(ctx.structure, saved(ctx))
        gradients = pair.operator._logdet_gradient(pair.factors)
        terms: list[Tensor | None] = []
        for tangent, gradient, (_, own) in zip(tangents, gradients, pair.operator._tensors(), strict=False):
            if tangent is not None:
                product = tangent * gradient
                terms.append(product.flatten(product.ndim - own).sum(-1) if own else product)
        total = sum_of(*terms)
        assert total is not None
        return total


@hide_from_compiler
class _Graft(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, expression: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, g.sum_to_size(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, tangent: Tensor | None) -> Tensor | None:
        return None if tangent is None else tangent.clone()


@hide_from_compiler
class _WithoutDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(why: str, value: Tensor, *tensors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.why, ctx.count = inputs[0], len(inputs) - 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if any(ctx.needs_input_grad[2:]):
            raise NotClosedError(ctx.why)
        return None, g, *([None] * ctx.count)

    @staticmethod
    def jvp(ctx: Any, _: Any, tangent: Tensor | None, *tangents: Tensor | None) -> Tensor | None:
        if any(t is not None for t in tangents):
            raise NotClosedError(ctx.why)
        return None if tangent is None else tangent.clone()


def frozen_factors(P: Any) -> Any:
    """The factors of an operator whose tensors are wrapped by a transform, constant at every level of it."""
    made = _Note()
    tensors = _Factorize.apply(  # type: ignore[no-untyped-call]
        P._structure(), made, *(t for t, _ in P._tensors())
    )
    assert made.structure is not None
    return build(made.structure, tensors).factors


class _Note:
    """Carries the structure of the factors out of a kernel, which may return tensors only."""

    structure: Structure | None = None


@hide_from_compiler
class _Factorize(torch.autograd.Function):
    @staticmethod
    def forward(structure: Structure, made: _Note, *leaves: Tensor) -> tuple[Tensor, ...]:
        P = build(structure, leaves)
        with torch.no_grad():
            factors = Factored(None, P._factorize())
        made.structure = factors._structure()
        # Outputs of a kernel may not be its inputs, nor share memory with them.
        return tuple(t.clone() for t, _ in factors._tensors())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.n_inputs, ctx.n_outputs = len(inputs), len(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * ctx.n_inputs

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * ctx.n_outputs

    @staticmethod
    def vmap(info: Any, in_dims: Any, structure: Structure, made: _Note, *leaves: Tensor) -> Any:
        """One factorisation of the batched operator: the mapped dimension becomes its leftmost batch dimension."""
        own = [n for _, n in build(structure, leaves)._tensors()]
        dims = in_dims[2:]
        width = max(t.ndim - (d is not None) - n for t, d, n in zip(leaves, dims, own, strict=True))
        moved = []
        for tensor, dim, n in zip(leaves, dims, own, strict=True):
            tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
            moved.append(
                tensor.reshape(tensor.shape[0], *(1,) * (width + n + 1 - tensor.ndim), *tensor.shape[1:])
            )
        tensors = _Factorize.apply(  # type: ignore[no-untyped-call]
            structure, made, *(t.expand(info.batch_size, *t.shape[1:]) for t in moved)
        )
        # What does not depend on the data, such as the eigenvalues of an identity, has no batch of its own.
        assert made.structure is not None
        factors = build(made.structure, tensors)
        return tensors, tuple(0 if t.ndim - n > width else None for t, n in factors._tensors())
