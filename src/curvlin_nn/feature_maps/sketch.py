"""Random projections of the Jacobian: an unbiased kernel that never looks at data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin._check import positive_integer
from curvlin_nn.capture.state import device_of
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.feature_maps.directions import FlatDirections
from curvlin_nn.feature_maps.jacobian import JacobianMap
from curvlin_nn.feature_maps.probes import signs
from curvlin_nn.feature_maps.projected import ProjectedMap
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.parameters import Selection

DISTRIBUTIONS = ("rademacher", "gaussian")
"""What the entries of the projection may be drawn from."""


class SketchMap(ProjectedMap):
    """``Phi = J Omega / sqrt(K)`` with random Omega: ``E Phi Phi^T = J J^T``.

    For rows a and b of J, the entry of the kernel has variance ``(|a|^2 |b|^2 + (a b)^2) / K`` with Gaussian entries,
    and ``2 sum_p a_p^2 b_p^2 / K`` less with Rademacher ones (ScaLLA, arXiv 2601.21835, Eqs. 5 and 6). Omega is kept.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
        rank: K.
        subset_of_weights: ``"all"``, names of parameters or modules, or a predicate.
        distribution: ``"rademacher"`` or ``"gaussian"``.
        generator: source of randomness; None is torch's default generator.
    """

    @outside_inference_mode()
    def __init__(
        self,
        model: nn.Module,
        rank: int,
        *,
        subset_of_weights: Selection = "all",
        distribution: str = "rademacher",
        generator: torch.Generator | None = None,
    ) -> None:
        rank = positive_integer("rank", rank)
        if distribution not in DISTRIBUTIONS:
            raise UnsupportedError(
                f"distribution={distribution!r} is not supported; expected {one_of(DISTRIBUTIONS)}"
            )
        jacobian = JacobianMap(model, subset_of_weights)
        Omega = _drawn(distribution, (jacobian.size, rank), jacobian.space.dtype(model), generator)
        super().__init__(jacobian, FlatDirections(Omega.to(device_of(model)) / rank**0.5))


def _drawn(
    distribution: str, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator | None
) -> Float[Tensor, "P K"]:
    if distribution == "gaussian":
        device = None if generator is None else generator.device
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return signs(shape, dtype, generator)
