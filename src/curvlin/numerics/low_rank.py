"""The k x k factorisation behind a low-rank change of a precision, and how its accuracy is kept.

For ``P = Z + s w U U^T`` with ``s = +1`` or ``-1`` and ``w > 0``, everything follows from the Cholesky factor of the
capacitance matrix

    H = I + s w U^T Z^-1 U = L L^T.

Forming H costs the accuracy ``eps cond(H)``. Where that is too much, L comes instead from orthogonal factorisations of
``V = sqrt(w) R_Z^-1 U`` (``R_Z R_Z^T = Z``), which never forms H: for ``s = +1`` a QR of V stacked on I (Yip 1986), for
``s = -1`` the singular values of V, as ``1 - sigma^2 = (1 - sigma)(1 + sigma)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError

_SAFE_PIVOT = 1e-6
"""The smallest squared pivot, relative to its diagonal entry, at which forming H still leaves 10 digits."""


def capacitance_lower(H: Tensor, whitened: Callable[[], Tensor] | None, sign: int, where: str) -> Tensor:
    """L with ``L L^T = H``.

    Args:
        H: ``I + s V^T V``, ``(..., k, k)``, float64.
        whitened: makes V, ``(..., D, k)``, when H turns out to be too ill-conditioned; None if V cannot be formed.
        sign: s.
        where: the name under which a failure is reported.

    Raises:
        NotPositiveDefiniteError: if the changed precision is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(H)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square() / H.diagonal(dim1=-2, dim2=-1)
    if bool((info == 0).all()) and bool((pivots > _SAFE_PIVOT).all()):
        return lower
    if whitened is None:
        if bool((info == 0).all()):
            return lower
        raise NotPositiveDefiniteError(where, float(torch.linalg.eigvalsh(H).min()))
    V = whitened()
    if sign > 0:
        eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device).expand(*V.shape[:-2], -1, -1)
        return _positive(torch.linalg.qr(torch.cat([V, eye], dim=-2), mode="r").R)
    _, singular, Wh = torch.linalg.svd(torch.linalg.qr(V, mode="r").R, full_matrices=True)
    singular = torch.nn.functional.pad(singular, (0, Wh.shape[-1] - singular.shape[-1]))
    remaining = (1 - singular) * (1 + singular)
    if not bool((remaining > 0).all()):
        raise NotPositiveDefiniteError(where, float(remaining.min()))
    return _positive(torch.linalg.qr(remaining.sqrt()[..., None] * Wh, mode="r").R)


def _positive(upper: Tensor) -> Tensor:
    """The lower factor R^T of a QR, with positive pivots."""
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (upper * signs[..., None].to(upper)).mT


def leverage_split(d: Tensor, V: Tensor, lower: Tensor) -> Tensor:
    """The diagonal of ``(diag(d) + U U^T)^-1`` to full relative accuracy, with ``V = d^{-1/2} U`` and ``L L^T = I + V^T V``.

    The formula ``(1 - h_i) / d_i`` with leverages ``h_i = |L^-1 v_i|^2`` cancels as h_i nears 1. Since the leverages sum to
    at most k, few rows S do; for them ``(P^-1)_SS = (D_S + G G^T)^-1`` with ``G = U_S R^-1``, R the triangular factor of the
    other rows stacked on I, by a QR of ``[D_S^{1/2}; G^T]``.

    Args:
        d: ``(D,)``, positive.
        V: ``(D, k)``.
        lower: ``(k, k)``.
    """
    leverage = torch.linalg.solve_triangular(lower, V.mT, upper=False).square().sum(-2)
    result = (1 - leverage) / d
    high = leverage > 0.5
    if not bool(high.any()):
        return result
    rest = V[~high]
    eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    upper = torch.linalg.qr(torch.cat([rest, eye]), mode="r").R
    # In whitened rows (P^-1)_SS = D_S^{-1/2} (I + W W^T)^-1 D_S^{-1/2}, W = V_S R^-1.
    W = torch.linalg.solve_triangular(upper.mT, V[high].mT, upper=False).mT
    eye_s = torch.eye(W.shape[0], dtype=V.dtype, device=V.device)
    scale = d[high].sqrt()
    stacked = torch.cat([torch.diag_embed(scale), (W * scale[:, None]).mT])
    inverse = torch.linalg.solve_triangular(torch.linalg.qr(stacked, mode="r").R, eye_s, upper=True)
    result = result.clone()
    result[high] = inverse.square().sum(-1)
    return result
