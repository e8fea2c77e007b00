"""Gradients of solves, quadratic forms and log-determinants by implicit differentiation.

An operator that uses this module says two things: its product ``P @ X`` by plain differentiable operations, and
*values* (`_solve_value`, ...) computed from a factorisation that autograd never sees. With ``x = P^-1 b``,

    d(P^-1 b)     = P^-1 (db - dP x)
    d(b^T P^-1 b) = 2 x^T db - x^T dP x
    d(log det P)  = tr(P^-1 dP)

so no derivative of an eigenvector is ever taken, repeated eigenvalues are harmless, and since the backward formulas
are written with the same differentiable functions, every order of derivative follows. (`log_det` asks the
operator for ``tr(P^-1 dP)`` as `_logdet_gradient`, and has the orders that this has.)

The functions take the operator apart into its tensors, which is what autograd sees; under `vmap` the batch
dimension of each tensor moves to the left of the operator's own batch, and the kernel runs once on the batched
operator, so that checks of values stay inside the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import Structure, Tree, build, needs_grad


def solve(P: Any, X: Tensor, factors: Any) -> Tensor:
    """``P^-1 X`` for ``X`` of shape ``(..., D, K)``."""
    if factors is not None and not (P._needs_grad() or needs_grad(X)):
        value: Tensor = P._solve_value(X, factors)
        return value
    return apply_kernel(_Solve, P._structure(), factors, X, [t for t, _ in P._tensors()])


def inv_quad(P: Any, X: Tensor, factors: Any) -> Tensor:
    """``x^T P^-1 x`` of each column of ``X``: ``(..., D, K) -> (..., K)``."""
    if factors is not None and not (P._needs_grad() or needs_grad(X)):
        value: Tensor = P._inv_quad_value(X, factors)
        return value
    return apply_kernel(_InvQuad, P._structure(), factors, X, [t for t, _ in P._tensors()])


def log_det(P: Any, factors: Any) -> Tensor:
    """``log det P``."""
    if factors is not None and not P._needs_grad():
        value: Tensor = P._logdet_value(factors)
        return value
    return apply_kernel(_LogDet, P._structure(), factors, None, [t for t, _ in P._tensors()])


@torch.compiler.disable
def apply_kernel(function: Any, structure: Structure, factors: Any, X: Tensor | None, leaves: Sequence[Tensor]) -> Tensor:
    result: Tensor = function.apply(structure, factors, X, *leaves)
    return result


def rebuilt(structure: Structure, leaves: Sequence[Tensor], factors: Any) -> tuple[Any, Any]:
    """The operator on these tensors and its factors, for use inside a kernel (no gradient)."""
    P = build(structure, leaves)
    with torch.no_grad():
        return P, (P._factorize() if factors is None else factors)


def pull_back(
    structure: Structure, leaves: Sequence[Tensor], wanted: Sequence[bool], fn: Callable[[Any], Tensor], cotangent: Tensor
) -> list[Tensor | None]:
    """Gradients of ``<cotangent, fn(P)>`` with respect to the wanted tensors of P."""
    chosen = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    if not chosen:
        return [None] * len(leaves)

    def of_chosen(*tensors: Tensor) -> Tensor:
        queue = list(tensors)
        merged = [queue.pop(0) if want else leaf for leaf, want in zip(leaves, wanted, strict=True)]
        return fn(build(structure, merged))

    output, vjp = torch.func.vjp(of_chosen, *chosen)
    gradients = list(vjp(cotangent.expand_as(output)))
    return [gradients.pop(0) if want else None for want in wanted]


def push_forward(
    structure: Structure, leaves: Sequence[Tensor], tangents: Sequence[Tensor | None], fn: Callable[[Any], Tensor]
) -> Tensor | None:
    """The directional derivative of ``fn(P)`` along the tangents of P's tensors, or None if there are none."""
    moving = [t is not None for t in tangents]
    if not any(moving):
        return None

    def of_moving(*tensors: Tensor) -> Tensor:
        queue = list(tensors)
        merged = [queue.pop(0) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
        return fn(build(structure, merged))

    primals = tuple(leaf for leaf, moves in zip(leaves, moving, strict=True) if moves)
    _, derivative = torch.func.jvp(of_moving, primals, tuple(t for t in tangents if t is not None))
    result: Tensor = derivative
    return result


def _aligned(
    structure: Structure, in_dims: Sequence[int | None], X: Tensor | None, leaves: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor], bool]:
    """X and the tensors of P with the dimension that `vmap` maps over as the leftmost batch dimension of all."""
    _, _, x_dim, *leaf_dims = in_dims
    example: Tree = build(structure, leaves)
    own = [n for _, n in example._tensors()]
    tensors, dims, ndims = list(leaves), list(leaf_dims), list(own)
    if X is not None:
        tensors, dims, ndims = [*tensors, X], [*dims, x_dim], [*ndims, 2]
    batch = [t.ndim - (d is not None) - n for t, d, n in zip(tensors, dims, ndims, strict=True)]
    width = max(batch)
    moved = []
    for tensor, dim, n_batch in zip(tensors, dims, batch, strict=True):
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            tensor = tensor.reshape(tensor.shape[0], *(1,) * (width - n_batch), *tensor.shape[1:])
        moved.append(tensor)
    x = moved.pop() if X is not None else None
    return x, moved, any(d is not None for d in leaf_dims)


def mapped(function: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Tensor, int]:
    """The common `vmap` rule: one call on the batched operator."""
    structure, factors, X, *leaves = args
    x, moved, operator_is_mapped = _aligned(structure, in_dims, X, leaves)
    return apply_kernel(function, structure, None if operator_is_mapped else factors, x, moved), 0


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(structure: Structure, factors: Any, X: Tensor, *leaves: Tensor) -> Tensor:
        P, factors = rebuilt(structure, leaves, factors)
        value: Tensor = P._solve_value(X, factors)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, ctx.factors, X, *leaves = inputs
        ctx.x_shape = X.shape
        ctx.save_for_backward(output, *leaves)
        ctx.save_for_forward(output, *leaves)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        solution, *leaves = ctx.saved_tensors
        Y = apply_kernel(_Solve, ctx.structure, ctx.factors, G, leaves)
        grads = pull_back(ctx.structure, leaves, ctx.needs_input_grad[3:], lambda P: P._matmul(solution), -Y)
        return None, None, (Y.sum_to_size(ctx.x_shape) if ctx.needs_input_grad[2] else None), *grads

    @staticmethod
    def jvp(ctx: Any, _s: Any, _f: Any, dX: Tensor | None, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        solution, *leaves = ctx.saved_tensors
        change = push_forward(ctx.structure, leaves, tangents, lambda P: P._matmul(solution))
        right = -change if dX is None else (dX if change is None else dX - change)  # type: ignore[operator]
        return apply_kernel(_Solve, ctx.structure, ctx.factors, right.expand_as(solution), leaves)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return mapped(_Solve, in_dims, args)


class _InvQuad(torch.autograd.Function):
    @staticmethod
    def forward(structure: Structure, factors: Any, X: Tensor, *leaves: Tensor) -> Tensor:
        P, factors = rebuilt(structure, leaves, factors)
        value: Tensor = P._inv_quad_value(X, factors)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, ctx.factors, X, *leaves = inputs
        ctx.save_for_backward(X, *leaves)
        ctx.save_for_forward(X, *leaves)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        X, *leaves = ctx.saved_tensors
        solution = apply_kernel(_Solve, ctx.structure, ctx.factors, X, leaves)

        def energy(P: Any) -> Tensor:  # -x^T P x with x held fixed, whose derivative is that of the quadratic form
            quad: Tensor = -(solution * P._matmul(solution)).sum(-2)
            return quad

        grads = pull_back(ctx.structure, leaves, ctx.needs_input_grad[3:], energy, g)
        grad_x = (2 * g.unsqueeze(-2) * solution).sum_to_size(X.shape) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, *grads

    @staticmethod
    def jvp(ctx: Any, _s: Any, _f: Any, dX: Tensor | None, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        X, *leaves = ctx.saved_tensors
        solution = apply_kernel(_Solve, ctx.structure, ctx.factors, X, leaves)
        change = push_forward(ctx.structure, leaves, tangents, lambda P: -(solution * P._matmul(solution)).sum(-2))
        moved = None if dX is None else 2 * (solution * dX).sum(-2)
        return moved if change is None else (change if moved is None else moved + change)  # type: ignore[return-value]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return mapped(_InvQuad, in_dims, args)


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(structure: Structure, factors: Any, _: None, *leaves: Tensor) -> Tensor:
        P, factors = rebuilt(structure, leaves, factors)
        value: Tensor = P._logdet_value(factors)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, ctx.factors, _, *leaves = inputs
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        leaves = ctx.saved_tensors
        P: Any = build(ctx.structure, leaves)
        gradients = P._logdet_gradient(ctx.factors)
        batched = []
        for (leaf, own), gradient in zip(P._tensors(), gradients, strict=True):
            weight = g.reshape(*g.shape, *(1,) * own)
            batched.append((weight * gradient).sum_to_size(leaf.shape))
        return None, None, None, *batched

    @staticmethod
    def jvp(ctx: Any, _s: Any, _f: Any, _x: Any, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        leaves = ctx.saved_tensors
        P: Any = build(ctx.structure, leaves)
        total: Tensor | None = None
        for tangent, gradient, (_, own) in zip(tangents, P._logdet_gradient(ctx.factors), P._tensors(), strict=True):
            if tangent is None:
                continue
            term = (tangent * gradient).sum(tuple(range(-own, 0))) if own else tangent * gradient
            total = term if total is None else total + term
        if total is None:
            raise RuntimeError("log_det was differentiated along no tangent")
        return total

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return mapped(_LogDet, in_dims, args)

