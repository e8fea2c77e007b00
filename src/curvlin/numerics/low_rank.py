"""The eigenproblem of size k behind a low-rank change of a precision, and how its accuracy is kept.

In coordinates that whiten the base, ``P = Z + s U U^T`` is ``I + s V V^T`` with ``V = R_Z^-1 U``. Two
routes to its spectrum, both exact:

- *orthonormal*: ``V = Q diag(sigma) W^T`` by QR and SVD; functions of P act as ``f(1 + s sigma^2)`` on ``Q^T
  x`` and as the identity on the rest, so nothing cancels. O(D k^2), with the larger constant.
- *Gram*: ``V^T V = W diag(sigma^2) W^T``; functions of P act as ``I + V W diag(...) W^T V^T``, with V applied and
  never stored. Loses a factor cond(V^T V + I) of accuracy, so it is taken where that is harmless and the size
  makes the other route expensive, and for features, which have no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import Tree, hide_from_compiler, is_concrete, tensor_field
from curvlin.numerics.implicit import saved
from curvlin.numerics.tall import row_slices

_SAFE_PIVOT = 1e-6
"""The smallest squared pivot, relative to its diagonal entry, at which forming a Gram matrix leaves 10 digits."""

_MILD = 16.0
"""The condition of H up to which a product with H^-1 in the dtype of U is as good as one rounded to it."""

ALWAYS_ORTHONORMAL = 2**21
"""Entries of V up to which a QR costs milliseconds."""


@dataclass(eq=False, repr=False)
class LowRankFactors(Tree):
    """P (without a weight) as a change of Z in the directions of V.

    Attributes:
        base: the factors of Z.
        Q: ``(..., D, r)``, orthonormal columns; None in the Gram route.
        W: ``(..., k, r)``, orthonormal columns.
        gain: ``sigma^2``, ``(..., r)``.
        h: ``1 + s sigma^2``, ``(..., r)``.
    """

    base: Any = tensor_field(0)
    Q: Tensor | None = tensor_field(2)
    W: Tensor = tensor_field(2)
    gain: Tensor = tensor_field(1)
    h: Tensor = tensor_field(1)


def from_columns(V: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, W, gain and h from V."""
    Q, R = torch.linalg.qr(V)
    left, sigma, Wh = torch.linalg.svd(R, full_matrices=False)
    gain = sigma.square()
    h = 1 + gain if sign > 0 else (1 - sigma) * (1 + sigma)
    return Q @ left, Wh.mT, gain, h


def from_gram(gram: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, gain and h from ``V^T V``."""
    gain, W = torch.linalg.eigh(gram)
    gain = gain.clamp(min=0.0)
    return W, gain, 1 + gain if sign > 0 else 1 - gain


def gram_is_safe(gram: Tensor, sign: int) -> bool:
    """Whether the Gram matrix ``V^T V`` leaves the answers about ten digits."""
    H = sign * gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(H)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    # A downdate leaves at most 1, and what is near 0 is a difference.
    reference = H.diagonal(dim1=-2, dim2=-1) if sign > 0 else torch.ones_like(pivots)
    return bool((info == 0).all()) and bool((pivots > _SAFE_PIVOT * reference).all())


def symmetric_gram(V: Tensor) -> Tensor:
    """``V^T V``, whose derivative ``V (G + G^T)`` is one product instead of two."""
    gram: Tensor = _SymmetricGram.apply(V)  # type: ignore[no-untyped-call]
    return gram


@hide_from_compiler
class _SymmetricGram(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(V: Tensor) -> Tensor:
        return V.mT @ V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        (V,) = saved(ctx)
        return V @ (G + G.mT)

    @staticmethod
    def jvp(ctx: Any, dV: Tensor) -> Tensor:
        (V,) = saved(ctx)
        half = V.mT @ dV
        return half + half.mT


INVERSE, ROOT, INVERSE_ROOT = "inverse", "root", "inverse root"


def spectral_value(h: Tensor, function: str) -> Tensor:
    """f(h) for h^-1, h^(1/2) and h^(-1/2)."""
    return {INVERSE: h.reciprocal, ROOT: h.sqrt, INVERSE_ROOT: h.rsqrt}[function]()


def spectral_change(h: Tensor, function: str, sign: int) -> Tensor:
    """``(f(h) - 1) / sigma^2`` with ``h = 1 + s sigma^2``, free of cancellation."""
    root = h.sqrt()
    magnitude = {INVERSE: -1 / h, ROOT: 1 / (1 + root), INVERSE_ROOT: -1 / (h + root)}[function]
    return sign * magnitude


def full_spectrum(factors: LowRankFactors) -> tuple[Tensor, Tensor]:
    """W and h over all k directions, also where the orthonormal route kept fewer than k."""
    k, r = factors.W.shape[-2:]
    if k == r:
        return factors.W, factors.h
    rest = torch.linalg.qr(factors.W, mode="complete").Q[..., r:]
    return torch.cat([factors.W, rest], dim=-1), torch.nn.functional.pad(factors.h, (0, k - r), value=1.0)


def over_capacitance(c: Tensor, factors: LowRankFactors) -> Tensor:
    """``H^-1 c`` for c in the range of ``V^T``, which the columns of W span.

    What c has beside them is rounding, and no gain would divide it.
    """
    W = factors.W
    return W @ ((W.mT @ c) / factors.h.unsqueeze(-1))


def root_of_middle(factors: LowRankFactors) -> Tensor:
    """``W h^(-1/2)``, a root of ``H^-1`` on the directions that count."""
    return factors.W / factors.h.sqrt().unsqueeze(-2)


def split_off(Q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``c = Q^T v`` and ``v - Q c`` for orthonormal Q, orthogonalised twice so that the rest keeps its digits."""
    c = Q.mT @ v
    rest = v - Q @ c
    again = Q.mT @ rest
    return c + again, rest - Q @ again


def leverages(
    U: Tensor,
    scale: Tensor,
    factors: LowRankFactors,
    out: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """For a diagonal base: the leverages ``diag(V H^-1 V^T)``, by slices of rows for which V fits in cache.

    Args:
        U: ``(..., D, k)``.
        scale: ``d^(-1/2)``, ``(..., D or 1, 1)``: ``V = scale U``.
        factors: of ``I + s V V^T``.
        out: where ``weight scale V H^-1`` goes, if it is wanted: of the shape and dtype of U.
        weight: a number.

    Returns:
        ``(..., D)``.
    """
    W, gain, h = factors.W, factors.gain, factors.h
    if factors.Q is None and is_concrete(h) and float(h.amax()) < _MILD * float(h.amin()):
        W, h, scale = (t.to(U.dtype) for t in (W, h, scale))
    left = W if factors.Q is None else gain.sqrt().diag_embed()
    middle = (left / h.unsqueeze(-2)) @ W.mT
    parts = []
    for rows in row_slices(U):
        r = scale if scale.shape[-2] == 1 else scale[..., rows, :]
        if factors.Q is None:
            V = U[..., rows, :].to(r.dtype) * r
            solved = V @ middle
            parts.append(torch.linalg.vecdot(solved, V).to(gain.dtype))
        else:
            Q = factors.Q[..., rows, :]
            parts.append((Q.square() * (gain / h).unsqueeze(-2)).sum(-1))
            solved = Q if out is None else Q @ middle
        if out is not None:
            out[..., rows, :] = solved.mul_((weight * r).to(solved.dtype))
    return torch.cat(parts, dim=-1)


def leverage_split(V: Tensor, leverage: Tensor) -> Tensor:
    """The diagonal of ``(I + V V^T)^-1`` to full relative accuracy, given the leverages ``h_i`` of its rows.

    The formula ``1 - h_i`` cancels as h_i nears 1. Since the leverages sum to at most k, few rows S come near;
    for them ``((I + V V^T)^-1)_SS = (I + G G^T)^-1`` with ``G = V_S R^-1``, R the triangular factor of the
    other rows stacked on I.

    Args:
        V: ``(D, k)``.
        leverage: ``(D,)``.
    """
    result = 1 - leverage
    high = leverage > 0.5
    eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    R = torch.linalg.qr(torch.cat([V[~high], eye]), mode="r").R
    G = torch.linalg.solve_triangular(R.mT, V[high].mT, upper=False).mT
    eye = torch.eye(G.shape[0], dtype=V.dtype, device=V.device)
    inverse = torch.linalg.solve_triangular(
        torch.linalg.qr(torch.cat([eye, G.mT]), mode="r").R, eye, upper=True
    )
    result[high] = inverse.square().sum(-1)
    return result
