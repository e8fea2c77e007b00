"""The symmetric square root of a positive definite matrix, differentiable to every order.

With ``S = H^{1/2}``, ``dS`` solves the Lyapunov equation ``S dS + dS S = dH``, which divides by sums of
eigenvalues of S and never by differences (Higham, Functions of Matrices, section 6.1). The solution of that
equation is differentiated the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin._tree import hide_from_compiler
from curvlin.numerics.implicit import saved


def symmetric_root(H: Tensor, W: Tensor, h: Tensor) -> Tensor:
    """``H^{1/2}`` for ``H = W diag(h) W^T``, all ``(..., k, k)``; the eigendecomposition is a constant."""
    result: Tensor = _Root.apply(H, W, h.sqrt())  # type: ignore[no-untyped-call]
    return result


def _lyapunov(S: Tensor, C: Tensor, W: Tensor, r: Tensor) -> Tensor:
    result: Tensor = _Lyapunov.apply(S, C, W, r)  # type: ignore[no-untyped-call]
    return result


@hide_from_compiler
class _Root(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(H: Tensor, W: Tensor, r: Tensor) -> Tensor:
        return (W * r.unsqueeze(-2)) @ W.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        S, W, r = saved(ctx)
        return _lyapunov(S, G, W, r).sum_to_size(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, dH: Tensor | None, *_: Any) -> Any:
        S, W, r = saved(ctx)
        return None if dH is None else _lyapunov(S, dH, W, r)


@hide_from_compiler
class _Lyapunov(torch.autograd.Function):
    """X with ``S X + X S = C``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(S: Tensor, C: Tensor, W: Tensor, r: Tensor) -> Tensor:
        return W @ ((W.mT @ C @ W) / (r.unsqueeze(-1) + r.unsqueeze(-2))) @ W.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        S, _, W, r = inputs
        ctx.save_for_backward(S, output, W, r)
        ctx.save_for_forward(S, output, W, r)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        S, X, W, r = saved(ctx)
        Y = _lyapunov(S, G, W, r)
        return -(Y @ X.mT + X.mT @ Y), Y, None, None

    @staticmethod
    def jvp(ctx: Any, dS: Tensor | None, dC: Tensor | None, *_: Any) -> Any:
        S, X, W, r = saved(ctx)
        change = torch.zeros_like(X) if dC is None else dC
        if dS is not None:
            change = change - (dS @ X + X @ dS)
        return _lyapunov(S, change, W, r)
