"""A matrix seen from a basis X that diagonalises it: what is known in value has its derivatives left.

``X^T M X`` is the diagonal matrix of a spectrum computed elsewhere; only its derivatives in M need products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin._tree import hide_from_compiler
from curvlin.numerics.implicit import saved


def rotated_diagonal(M: Tensor, X: Tensor, spectrum: Tensor) -> Tensor:
    """The diagonal of ``X^T M X``, `spectrum` in value: ``(..., n)``."""
    result: Tensor = _Diagonal.apply(M, X, spectrum)  # type: ignore[no-untyped-call]
    return result


def rotated_rest(M: Tensor, X: Tensor) -> Tensor:
    """``X^T M X`` without its diagonal, zero in value: ``(..., n, n)``."""
    result: Tensor = _Rest.apply(M, X)  # type: ignore[no-untyped-call]
    return result


def _without_diagonal(G: Tensor) -> Tensor:
    return G - torch.diag_embed(G.diagonal(dim1=-2, dim2=-1))


@hide_from_compiler
class _Diagonal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, X: Tensor, spectrum: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(M.shape[:-2], X.shape[:-2], spectrum.shape[:-1])
        return spectrum.expand(*batch, -1).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        M, X, _ = inputs
        ctx.shape = M.shape
        ctx.save_for_backward(X)
        ctx.save_for_forward(X)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (X,) = saved(ctx)
        return ((X * g.unsqueeze(-2)) @ X.mT).sum_to_size(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, dM: Tensor, *_: Any) -> Tensor:
        (X,) = saved(ctx)
        return ((dM @ X) * X).sum(-2)


@hide_from_compiler
class _Rest(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, X: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(M.shape[:-2], X.shape[:-2])
        return M.new_zeros((*batch, X.shape[-1], X.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        M, X = inputs
        ctx.shape = M.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(X)
        ctx.save_for_forward(X)

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> tuple[Tensor | None, None]:
        if G is None:  # a first derivative, which the rest has no part in
            return None, None
        (X,) = saved(ctx)
        return (X @ _without_diagonal(G) @ X.mT).sum_to_size(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, dM: Tensor, _: Any) -> Tensor:
        (X,) = saved(ctx)
        return _without_diagonal(X.mT @ dM @ X)
