"""Derivatives of products, solves and log-determinants that were not computed by differentiable operations.

    d(P x)        = P dx + dP x
    d(P^-1 b)     = P^-1 (db - dP x)
    d(log det P)  = tr(P^-1 dP) = E[w^T dP v],    w = P^-1 R z,  v = R^-T z,    E[v (R z)^T] = I

A product is asked for derivatives in the tensors of P only: in x it is P itself, which is symmetric. A backward pass of
a solve is a solve. Backward formulas are made of the same functions, so that second derivatives are those of the
exact answer to the tolerance of the solves; a solve in a backward pass that does not converge raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import hide_from_compiler

Multiply = Callable[..., Tensor]
Solve = Callable[[Tensor], Tensor]


def solution(x: Tensor, B: Tensor, multiply: Multiply, solve: Solve, tensors: tuple[Tensor, ...]) -> Tensor:
    """`x`, known to be ``P^-1 B``, with its derivatives in B and in the tensors of P."""
    result: Tensor = _Solution.apply(x, B, multiply, solve, *tensors)  # type: ignore[no-untyped-call]
    return result


def product(X: Tensor, multiply: Multiply, tensors: tuple[Tensor, ...]) -> Tensor:
    """``P X`` with its derivatives in X and in the tensors of P."""
    result: Tensor = _Product.apply(X, multiply, *tensors)  # type: ignore[no-untyped-call]
    return result


def log_determinant(
    value: Tensor, V: Tensor, RZ: Tensor, multiply: Multiply, solve: Solve, tensors: tuple[Tensor, ...]
) -> Tensor:
    """`value` with the derivative ``mean_i w_i^T dP v_i``, ``W = P^-1 RZ``."""
    result: Tensor = _LogDet.apply(value, V, RZ, multiply, solve, *tensors)  # type: ignore[no-untyped-call]
    return result


@hide_from_compiler
class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, multiply: Multiply, *tensors: Tensor) -> Tensor:
        ctx.multiply = multiply
        ctx.save_for_backward(X, *tensors)
        return multiply(X, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        X, *tensors = ctx.saved_tensors
        gX = product(g, ctx.multiply, tuple(tensors)) if ctx.needs_input_grad[0] else None
        return gX, None, *_pull_back(ctx.multiply, X, tensors, g, ctx.needs_input_grad[2:])


@hide_from_compiler
class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, multiply: Multiply, solve: Solve, *tensors: Tensor) -> Tensor:
        x = x.clone()
        ctx.functions = multiply, solve
        ctx.save_for_backward(x, *tensors)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        multiply, solve = ctx.functions
        W = solution(solve(g), g, multiply, solve, tuple(tensors))
        gradients = _pull_back(multiply, x, tensors, -W, ctx.needs_input_grad[4:])
        return None, W, None, None, *gradients


@hide_from_compiler
class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, V: Tensor, RZ: Tensor, multiply: Multiply, solve: Solve, *tensors: Tensor
    ) -> Tensor:
        ctx.functions = multiply, solve
        ctx.save_for_backward(V, RZ, *tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        V, RZ, *tensors = ctx.saved_tensors
        multiply, solve = ctx.functions
        W = solution(solve(RZ), RZ, multiply, solve, tuple(tensors))
        cotangent = W * (g / V.shape[-1]).to(W.dtype)
        gradients = _pull_back(multiply, V, tensors, cotangent, ctx.needs_input_grad[5:])
        return None, None, None, None, None, *gradients


def _pull_back(
    multiply: Multiply, X: Tensor, tensors: list[Tensor], cotangent: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of ``<cotangent, P X>`` in the tensors of P alone, themselves differentiable where that is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh nodes: X and the cotangent depend on the same tensors, which is not meant here.
        own = [
            (t.view_as(t) if create_graph else t.detach().requires_grad_()) if w else t.detach()
            for t, w in zip(tensors, wanted, strict=True)
        ]
        energy = (cotangent * multiply(X, *own)).sum()
        chosen = [t for t, w in zip(own, wanted, strict=True) if w]
        found = list(
            torch.autograd.grad(energy, chosen, create_graph=create_graph, materialize_grads=True)
            if chosen
            else ()
        )
    return [found.pop(0) if w else None for w in wanted]
