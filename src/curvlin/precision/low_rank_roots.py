"""The root of ``P = Z + s U U^T``, from coordinates that whiten the base: there P is ``I + s V V^T``, ``V = R_Z^-1 U``.

Where V is large it is not formed: it acts as ``V c = R_Z^-1 U c``, ``V^T x = U^T R_Z^-T x``. Each value has a twin by
differentiable operations whose derivatives it takes; with ``H = I + s V^T V`` and ``S = H^{1/2}`` these are

    (I + s V V^T)^{1/2}  = I + s V (I + S)^-1 V^T
    (I + s V V^T)^{-1/2} = I - s V (H + S)^-1 V^T
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlin._tree import needs_grad
from curvlin.numerics import linear
from curvlin.numerics.implicit import graft
from curvlin.numerics.low_rank import (
    INVERSE_ROOT,
    ROOT,
    LowRankFactors,
    full_spectrum,
    spectral_change,
    spectral_value,
    split_off,
)
from curvlin.numerics.refinement import refine
from curvlin.numerics.symmetric_root import symmetric_root

if TYPE_CHECKING:
    from curvlin.precision.low_rank import Woodbury


@dataclass(frozen=True)
class ChangedIdentity:
    """``I + s V V^T``, and the root ``R = R_Z (I + s V V^T)^{1/2}`` that P has by it.

    Attributes:
        P: without a core or a weight.
        factors: of P.
    """

    P: Woodbury
    factors: LowRankFactors

    def whiten(self, X: Tensor) -> Tensor:
        """``R^T X``."""
        P, factors = self.P, self.factors
        c = (factors.W.mT @ P._collect(X)) * spectral_change(factors.h, ROOT, P.sign).unsqueeze(-1)
        value = P.base._whiten(X, factors.base) + self._back(c)
        if P._needs_grad() or needs_grad(X):
            c = P.sign * _after_identity(self.capacitance_root()[1], P._collect(X))
            value = graft(value, P.base._whiten(X, factors.base) + self._spread(c))
        return value

    def unwhiten(self, Z: Tensor) -> Tensor:
        """``R^-T Z``."""
        P, factors = self.P, self.factors
        value = P.base._unwhiten(self.shrink(Z, INVERSE_ROOT), factors.base)
        if P._needs_grad() or needs_grad(Z):
            H, S = self.capacitance_root()
            u = P.base._unwhiten(Z, factors.base)
            c = P.sign * linear.solve(H + S, P._collect(u))
            value = graft(value, u - P.base._solve(P._spread(c), factors.base))
        return value

    # These two add U c itself, not R_Z V c: rows of very different size keep their digits.

    def root_matvec(self, Z: Tensor) -> Tensor:
        """``R Z``."""
        P, factors = self.P, self.factors
        c = factors.W @ (spectral_change(factors.h, ROOT, P.sign).unsqueeze(-1) * self._along(Z))
        value = P.base._root_matvec(Z, factors.base) + P._spread(c)
        if P._needs_grad() or needs_grad(Z):
            c = P.sign * _after_identity(self.capacitance_root()[1], self._collect(Z))
            value = graft(value, P.base._root_matvec(Z, factors.base) + P._spread(c))
        return value

    def root_solve(self, G: Tensor) -> Tensor:
        """``R^-1 G``."""
        P, factors = self.P, self.factors
        value = self.shrink(P.base._root_solve(G, factors.base), INVERSE_ROOT)
        if P._needs_grad() or needs_grad(G):
            H, S = self.capacitance_root()
            c = P.sign * linear.solve(H + S, P._collect(P.base._solve(G, factors.base)))
            value = graft(value, P.base._root_solve(G - P._spread(c), factors.base))
        return value

    def shrink(self, v: Tensor, function: str) -> Tensor:
        """``f(I + s V V^T) v`` for the inverse and the inverse root."""
        h = self.factors.h.unsqueeze(-1)
        if self.factors.Q is not None:
            c, rest = split_off(self.factors.Q, v)
            return rest + self.factors.Q @ (spectral_value(h, function) * c)

        def apply(f: str, x: Tensor) -> Tensor:
            return x + self._back(spectral_change(h, f, self.P.sign) * self._along(x))

        if function != INVERSE_ROOT:
            return apply(function, v)  # what solves with it refines its own result
        # The inverse root cancels along large gains; the root, by which it is refined, does not.
        norm = self.factors.h.amax(-1).clamp(min=1.0).sqrt()
        return refine(
            apply(INVERSE_ROOT, v), v, lambda x: apply(ROOT, x), lambda r: apply(INVERSE_ROOT, r), norm
        )

    def capacitance_root(self) -> tuple[Tensor, Tensor]:
        """H and S, differentiable."""
        H = self.P._capacitance(self.factors.base)
        W, h = full_spectrum(self.factors)
        return H, symmetric_root(H, W, h)

    def _collect(self, v: Tensor) -> Tensor:
        """``V^T v`` without V."""
        return self.P._collect(self.P.base._unwhiten(v, self.factors.base))

    def _spread(self, c: Tensor) -> Tensor:
        """``V c`` without V."""
        return self.P.base._root_solve(self.P._spread(c), self.factors.base)

    def _along(self, v: Tensor) -> Tensor:
        """``W^T V^T v``."""
        if self.factors.Q is not None:
            return self.factors.gain.sqrt().unsqueeze(-1) * (self.factors.Q.mT @ v)
        return self.factors.W.mT @ self._collect(v)

    def _back(self, c: Tensor) -> Tensor:
        """``V W c``."""
        if self.factors.Q is not None:
            return self.factors.Q @ (self.factors.gain.sqrt().unsqueeze(-1) * c)
        return self._spread(self.factors.W @ c)


def inverse_columns(P: Woodbury, factors: LowRankFactors) -> Tensor:
    """V of ``P^-1 = Z^-1 - s V V^T``: ``V = Z^-1 U H^{-1/2}``, for P without a core or weight and with a matrix U.

    No solve with H, which a large gain along fewer directions than columns makes singular to rounding.
    """
    assert isinstance(P.U, Tensor)
    W, h = factors.W, factors.h.unsqueeze(-2)
    if factors.Q is not None:
        white = factors.Q * factors.gain.sqrt().unsqueeze(-2)
        value = P.base._unwhiten(white / h.sqrt(), factors.base) @ W.mT
    else:
        value = P.base._solve(P.U.double(), factors.base) @ (W / h.sqrt()) @ W.mT
    if P._needs_grad():
        S = ChangedIdentity(P, factors).capacitance_root()[1]
        value = graft(value, linear.solve(S, P.base._solve(P.U.double(), factors.base), left=False))
    return value


def _after_identity(S: Tensor, c: Tensor) -> Tensor:
    """``(I + S)^-1 c``."""
    return linear.solve(S + torch.eye(S.shape[-1], dtype=S.dtype, device=S.device), c)
