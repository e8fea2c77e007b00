"""The posterior of a sparse Gaussian process in its dual form, around a mean that is known.

    prior       N(0, k)                                     a kernel k
    posterior   k_xx' - k_xZ L H^-1 L^T k_Zx'               H = I + L^T k_ZZ L
    divergence  KL = log|H| / 2 - tr(I - H^-1) / 2          its part that the covariance decides

L L^T = A is the precision that M inducing variables add: with features, ``k = Phi Phi^T``, the posterior precision of
their coordinates is ``I + Phi_Z^T A Phi_Z``. Any other mean adds its own norm to KL; where it is fixed that does not
matter (Cheng & Boots, 2017, Variational inference for Gaussian process models with linear complexity).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Dual:
    """What M inducing variables take from a prior.

    Differentiable in both; where H has no Cholesky factor, the results are NaN.

    Attributes:
        kernel: ``k_ZZ``, float64.
        root: L, float64.
    """

    kernel: Float[Tensor, "M M"]
    root: Float[Tensor, "M M"]

    @cached_property
    def _lower(self) -> Float[Tensor, "M M"]:
        """The Cholesky factor of H."""
        H = self.root.mT @ self.kernel @ self.root
        lower, info = torch.linalg.cholesky_ex((H + H.mT) / 2 + torch.eye(len(H)).to(H))
        return torch.where(info > 0, torch.nan, lower)

    def divergence(self) -> Float[Tensor, ""]:
        """KL, in nats."""
        logdet = 2 * self._lower.diagonal().log().sum()
        eye = torch.eye(len(self._lower)).to(self._lower)
        root = torch.linalg.solve_triangular(self._lower, eye, upper=False)
        return (logdet - (len(eye) - root.square().sum())) / 2

    def explained(self, cross: Float[Tensor, "*batch M"]) -> Float[Tensor, "*batch M"]:
        """E with ``k_xZ L H^-1 L^T k_Zx' = E E^T``, from ``k_xZ``."""
        return self.whitened(cross @ self.root)

    def whitened(self, along: Float[Tensor, "*batch M"]) -> Float[Tensor, "*batch M"]:
        """W with ``U H^-1 U'^T = W W'^T``, from rows U."""
        rows = along.reshape(-1, along.shape[-1])
        return torch.linalg.solve_triangular(self._lower, rows.mT, upper=False).mT.reshape(along.shape)
