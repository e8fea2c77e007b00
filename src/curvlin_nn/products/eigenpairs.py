"""The leading eigenpairs of a Hessian, of either sign: the low-rank structure of what may be indefinite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import LowRankPlusDiag
from curvlin._check import positive_integer
from curvlin._random import random_signs, standard_normal
from curvlin.iterative.results import Estimate, estimate
from curvlin_nn import likelihoods
from curvlin_nn.batches import Labelled
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.errors import IndefiniteHessianError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import Selection
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.hessian_sums import check_indefinite


@dataclass(frozen=True)
class Eigenpairs:
    """``H ~ V diag(values) V^T``.

    Attributes:
        values: float64, by decreasing magnitude.
        vectors: V, orthonormal columns, float64.
        residual: an estimate of ``|H - V diag(values) V^T|_F^2``, which bounds every norm of the difference.
        resolution: the rounding unit of the products.
    """

    values: Float[Tensor, " rank"]
    vectors: Float[Tensor, "P rank"]
    residual: Estimate
    resolution: float

    def operator(self, indefinite: str = "raise") -> LowRankPlusDiag:
        """``0 + U U^T``, singular until a prior is added.

        Args:
            indefinite: what negative eigenvalues do: "raise", "clip" (to zero) or "abs".

        Raises:
            IndefiniteHessianError: for a negative eigenvalue, if that is to raise.
        """
        check_indefinite(indefinite)
        values = self.values.abs() if indefinite == "abs" else self.values
        least = float(values.min())
        if indefinite == "raise" and least < -len(self.vectors) * self.resolution * float(values.abs().max()):
            raise IndefiniteHessianError("the low-rank Hessian", least)
        U = self.vectors * values.clamp(min=0.0).sqrt()
        return LowRankPlusDiag(U.new_zeros(len(U)), U)


@outside_inference_mode()
def hessian_eigenpairs(
    model: nn.Module,
    likelihood: str | Likelihood,
    loader: Iterable[Any],
    rank: int,
    subset_of_weights: Selection = "all",
    *,
    oversampling: int = 10,
    passes: int = 3,
    probes: int = 10,
    generator: torch.Generator | None = None,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> Eigenpairs:
    """Block subspace iteration with a Rayleigh-Ritz step at the end (Halko, Martinsson & Tropp, 2011).

    Exact where `rank` is at least the rank of H.

    Args:
        model: maps one argument to outputs ``(N, *T, C)``; it comes back as it was.
        likelihood: ``"classification"``, ``"regression"`` or a `Likelihood`.
        loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; iterated
            ``passes + 3`` times.
        rank: how many eigenpairs.
        subset_of_weights: as in `curvature`.
        oversampling: columns more that are multiplied.
        passes: over the data that turn the columns towards the leading eigenvectors.
        probes: random signs that `Eigenpairs.residual` is estimated with.
        generator: source of randomness; None is torch's default generator.
        dict_key_y: the name of the targets in loaders that yield mappings.
        progress_bar: whether to show one for each pass over the data.

    Raises:
        UnsupportedError, DataError, OutputError: as `matrix_free` raises them.
    """
    for name, number in (("rank", rank), ("passes", passes), ("probes", probes)):
        positive_integer(name, number)
    loader = Labelled(loader, dict_key_y)
    H = Hessian(model, likelihoods.resolve(likelihood), loader, subset_of_weights, progress_bar)
    with random_state_kept(device_of(model)):  # loaders draw from the default generator
        H.check()
    return leading_eigenpairs(H, rank, oversampling, passes, probes, generator)


def leading_eigenpairs(
    H: Hessian,
    rank: int,
    oversampling: int = 10,
    passes: int = 3,
    probes: int = 10,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Those of a Hessian that has been checked; see `hessian_eigenpairs`."""
    size, dtype = H.space.size, H.dtype
    like = torch.empty(0, dtype=dtype, device=H.device)
    width = min(size, rank + oversampling)
    Q = torch.linalg.qr(standard_normal((size, width), torch.Size(), generator, like).double()).Q
    for _ in range(passes):
        Q = torch.linalg.qr(H(Q.to(dtype)).double()).Q
    Z = random_signs((size, probes), generator, like)
    products = H(torch.cat([Q.to(dtype), Z], dim=1)).double()
    core = Q.mT @ products[:, :width]
    values, rotation = torch.linalg.eigh((core + core.mT) / 2)
    order = values.abs().argsort(descending=True)[:rank]
    values, V = values[order], Q @ rotation[:, order]
    left = products[:, width:] - V @ (values[:, None] * (V.mT @ Z.double()))
    residual = estimate(left.square().sum(0), width * (passes + 1) + probes)
    return Eigenpairs(values, V, residual, torch.finfo(dtype).eps)
