"""``K^{-1/2} Z`` for a Kronecker sum K whose factors commute on each side, differentiable to every order.

The value comes from the eigenbasis. The derivative comes from a rational form of the same function,

    K^{-1/2} = sum_q w_q (K + t_q I)^{-1},

the quadrature of Hale, Higham & Trefethen (SIAM J. Numer. Anal. 46, 2008, section 4), whose error falls as
``exp(-2 pi^2 n / (log cond K + 3))`` and is taken below rounding. Each term is a solve, which is differentiated
implicitly, so no difference of eigenvalues is ever divided by, and the work is products of factor size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import Structure, build, hide_from_compiler
from curvlin.numerics import implicit
from curvlin.numerics.implicit import saved

_AGM_STEPS = 10  # quadratic convergence: enough for every modulus above 1e-150


def inverse_square_root_rule(
    smallest: Tensor, largest: Tensor, n: int | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes t and weights w with ``x^{-1/2} = sum_q w_q / (x + t_q)`` to rounding, for smallest <= x <= largest.

    Args:
        smallest: positive, ``(...)``.
        largest: likewise.
        n: the number of nodes; what the worst ratio needs when None.

    Returns:
        Nodes and weights, each ``(n, ...)``.
    """
    k = (smallest / largest).sqrt()
    if n is None:
        worst = float(k.min()) if k.numel() else 1.0
        n = math.ceil((-2 * math.log(worst) + 3) * 38 / (2 * math.pi**2)) + 2
    means, differences = _arithmetic_geometric(k)
    period = math.pi / 2 / means[-1]
    steps = (torch.arange(n, dtype=k.dtype, device=k.device) + 0.5) / n
    fraction = steps.reshape(-1, *(1,) * k.ndim)
    # Beyond half the period cn is small; the reflection u -> period - u keeps its relative accuracy.
    near = fraction <= 0.5
    sn, cn, dn = _elliptic(torch.where(near, fraction, 1 - fraction) * period, k, means, differences)
    tangent = torch.where(near, sn / cn, cn / (k * sn))
    weight = torch.where(near, dn / cn.square(), dn / (k * sn.square()))
    return smallest * tangent.square(), 2 * period * smallest.sqrt() / (math.pi * n) * weight


def _arithmetic_geometric(k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The means a_i and half-differences c_i of the iteration that starts from (1, k)."""
    a, b = torch.ones_like(k), k
    means, differences = [a], [((1 - k) * (1 + k)).clamp(min=0.0).sqrt()]
    for _ in range(_AGM_STEPS):
        differences.append((a - b) / 2)
        a, b = (a + b) / 2, (a * b).sqrt()
        means.append(a)
    return means, differences


def _elliptic(
    u: Tensor, k: Tensor, means: list[Tensor], differences: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobi's sn, cn, dn of the modulus whose complement is k (Abramowitz & Stegun, 16.4).

    Library routines take the parameter ``1 - k^2``, which forgets a small k.
    """
    phi = 2.0**_AGM_STEPS * means[-1] * u
    for a, c in zip(means[:0:-1], differences[:0:-1], strict=True):
        phi = (torch.asin(c * phi.sin() / a) + phi) / 2
    sn, cn = phi.sin(), phi.cos()
    return sn, cn, (cn.square() + (k * sn).square()).sqrt()


def inverse_root(K: Any, Z: Tensor, factors: Any) -> Tensor:
    """``K^{-1/2} Z`` for Z of shape ``(..., D, k)``."""
    return implicit.apply_kernel(_InverseRoot, K, factors, Z)


def _product_with(x: Tensor) -> Callable[[Any], Tensor]:
    return lambda K: K._matmul(x)


@hide_from_compiler
class _InverseRoot(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(structure: Structure, Z: Tensor, *tensors: Tensor) -> Tensor:
        pair = build(structure, tensors)
        value: Tensor = pair.operator._inverse_root_value(Z, pair.factors)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, Z, *tensors = inputs
        ctx.save_for_backward(Z, *tensors)
        ctx.save_for_forward(Z, *tensors)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        Z, *tensors = saved(ctx)
        pair = build(ctx.structure, tensors)
        grad_z = inverse_root(pair.operator, G, pair.factors).sum_to_size(Z.shape)
        wanted = ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * len(wanted)
        batch = max(Z.ndim, G.ndim) - 2
        for shifted, factors, weights in (
            pair.operator._quadrature(pair.factors, batch) if any(wanted) else ()
        ):
            x = implicit.solve(shifted, Z, factors)
            y = implicit.solve(shifted, weights * G, factors)
            parts = implicit.pull_back(pair, wanted, _product_with(x), -y)
            grads = [implicit.sum_of(total, part) for total, part in zip(grads, parts, strict=True)]
        return None, grad_z, *grads

    @staticmethod
    def jvp(ctx: Any, _: Any, dZ: Tensor | None, *tangents: Tensor | None) -> Tensor:
        Z, *tensors = saved(ctx)
        pair = build(ctx.structure, tensors)
        total = None if dZ is None else inverse_root(pair.operator, dZ, pair.factors)
        for shifted, factors, weights in pair.operator._quadrature(pair.factors, Z.ndim - 2):
            x = implicit.solve(shifted, Z, factors)
            change = implicit.push_forward(pair, tangents, _product_with(-x))
            if change is None:
                break
            total = implicit.sum_of(total, (weights * implicit.solve(shifted, change, factors)).sum(0))
        assert total is not None
        return total
