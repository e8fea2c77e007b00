"""How near the kernel of any feature map comes to the tangent kernel that it stands in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.feature_maps.kernel_loss import least_error, relative_error
from curvlin_nn.inference_mode import outside_inference_mode


@dataclass(frozen=True)
class KernelError:
    """Of a kernel ``Phi Phi^T`` against ``kappa = J J^T``, on the rows of all outputs of some samples.

    Attributes:
        relative: ``|kappa - Phi Phi^T|_F / |kappa|_F``.
        optimum: the least that K features allow on these very samples (Eckart and Young).
        trace: ``tr Phi Phi^T / tr kappa``, the part of the prior variance that the features have; above one where they
            overshoot.
    """

    relative: float
    optimum: float
    trace: float


@outside_inference_mode()
def kernel_error(feature_map: FeatureMap, x: Any) -> KernelError:
    """The error of a map's kernel at x; takes ``(N C)^2`` numbers of memory, in float64.

    Args:
        feature_map: a map that stands in for a Jacobian.
        x: N samples that the map was not made of, such as held-out ones.

    Raises:
        UnsupportedError: if the map stands in for no Jacobian.
    """
    _, Phi, J = feature_map.with_jacobian(x)
    kappa = J.gram().flatten(2).flatten(0, 1)
    F = Phi.to_dense().flatten(0, 1)
    trace = float(F.square().sum() / kappa.diagonal().sum())
    return KernelError(relative_error(F, kappa), least_error(kappa, feature_map.size), trace)
