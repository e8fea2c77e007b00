"""Products with a tall matrix U that is stored in a narrower dtype than it is computed in.

``U c`` and ``U^T X`` in the dtype of c and X, a slice of rows widened at a time: a slice stays in cache, a widened
copy of U would be written to memory and read back by every product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import hide_from_compiler, is_concrete
from curvlin.numerics.implicit import saved, sum_of

_SLICE = 2**17
"""Entries widened at a time: 1 MiB in float64."""


def spread(U: Tensor, c: Tensor) -> Tensor:
    """``U c``: ``(..., D, k), (..., k, K) -> (..., D, K)``."""
    if U.dtype == c.dtype:
        return U @ c
    product: Tensor = _Spread.apply(U, c)  # type: ignore[no-untyped-call]
    return product


def collect(U: Tensor, X: Tensor) -> Tensor:
    """``U^T X``: ``(..., D, k), (..., D, K) -> (..., k, K)``."""
    if U.dtype == X.dtype:
        return U.mT @ X
    product: Tensor = _Collect.apply(U, X)  # type: ignore[no-untyped-call]
    return product


def gram(U: Tensor, scale: Tensor | None = None) -> Tensor:
    """``U^T diag(scale^2) U`` in float64, with `scale` ``(..., D or 1, 1)`` or None for one; not differentiable."""
    total: Tensor | None = None
    for rows in row_slices(U):
        part = U[..., rows, :].double()
        if scale is not None:
            part = part * (scale if scale.shape[-2] == 1 else scale[..., rows, :])
        total = part.mT @ part if total is None else _add_gram(total, part)
    assert total is not None
    return total


def _add_gram(total: Tensor, part: Tensor) -> Tensor:
    """``total + part^T part`` in the place of `total`."""
    return total.addmm_(part.mT, part) if part.ndim == 2 else total.add_(part.mT @ part)


def row_slices(U: Tensor) -> Iterator[slice]:
    """The rows of U, as many at a time as fit in cache, and no fewer than a product of their size pays for."""
    step = max(_SLICE // U.shape[-1], U.shape[-1])
    for start in range(0, U.shape[-2], step):
        yield slice(start, start + step)


def _outer(G: Tensor, c: Tensor, like: Tensor) -> Tensor:
    """``G c^T`` in the shape and dtype of U."""
    if torch.is_grad_enabled() or not is_concrete(G) or like.ndim > 2 or G.ndim > 2:
        return (G @ c.mT).sum_to_size(like.shape).to(like.dtype)
    product = torch.empty_like(like)
    for rows in row_slices(like):
        product[rows] = G[rows] @ c.mT
    return product


@hide_from_compiler
class _Spread(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor, c: Tensor) -> Tensor:
        return torch.cat([U[..., rows, :].to(c.dtype) @ c for rows in row_slices(U)], dim=-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None]:
        U, c = saved(ctx)
        needs_U, needs_c = ctx.needs_input_grad
        return (
            _outer(G, c, U) if needs_U else None,
            collect(U, G).sum_to_size(c.shape) if needs_c else None,
        )

    @staticmethod
    def jvp(ctx: Any, dU: Tensor | None, dc: Tensor | None) -> Tensor | None:
        U, c = saved(ctx)
        return sum_of(None if dU is None else spread(dU, c), None if dc is None else spread(U, dc))


@hide_from_compiler
class _Collect(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor, X: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for rows in row_slices(U):
            total = total + U[..., rows, :].to(X.dtype).mT @ X[..., rows, :]
        assert isinstance(total, Tensor)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        U, X = saved(ctx)
        needs_U, needs_X = ctx.needs_input_grad
        return (
            _outer(X, g, U) if needs_U else None,
            spread(U, g).sum_to_size(X.shape) if needs_X else None,
        )

    @staticmethod
    def jvp(ctx: Any, dU: Tensor | None, dX: Tensor | None) -> Tensor | None:
        U, X = saved(ctx)
        return sum_of(None if dU is None else collect(dU, X), None if dX is None else collect(U, dX))
