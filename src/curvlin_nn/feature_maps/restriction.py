"""Some columns of features, in factored form where they have one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin import BlockFeatures, DenseFeatures, FeatureOperator, KhatriRaoFeatures
from curvlin.precision.kronecker import product_index
from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.inference_mode import outside_inference_mode


class RestrictedMap(FeatureMap):
    """Some coordinates of another map's features: all others are held fixed.

    Args:
        feature_map: the other map.
        index: the coordinates.
    """

    def __init__(self, feature_map: FeatureMap, index: Int[Tensor, " k"]) -> None:
        self._feature_map, self._index = feature_map, index

    @property
    def size(self) -> int:
        """k, the number of coordinates that are left."""
        return len(self._index)

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """See `FeatureMap.output_shape`."""
        return self._feature_map.output_shape

    @outside_inference_mode()
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """See `FeatureMap.__call__`."""
        f, Phi = self._feature_map(x)
        return f, restricted(Phi, self._index.to(f.device))


def restricted(Phi: FeatureOperator, index: Int[Tensor, " k"]) -> FeatureOperator:
    """``Phi[:, :, index]``, cut as `PrecisionOperator.conditional` cuts a precision of the same blocks.

    Rows times columns of a layer's weight stay in factored form; other coordinates are multiplied out.
    """
    if isinstance(Phi, BlockFeatures):
        return _by_part(Phi, index)
    if isinstance(Phi, KhatriRaoFeatures) and (grid := product_index(index, Phi.in_features)) is not None:
        outputs, inputs = grid
        return KhatriRaoFeatures(Phi.left[..., outputs], Phi.right[..., inputs])
    return DenseFeatures(Phi.columns(index))


def _by_part(Phi: BlockFeatures, index: Tensor) -> BlockFeatures:
    place = torch.full((Phi.size,), -1)
    place[index.cpu()] = torch.arange(len(index))
    parts: list[FeatureOperator] = []
    places: list[Tensor] = []
    for part, coordinates in zip(Phi.parts, Phi.indices.blocks, strict=True):
        local = (place[coordinates] >= 0).nonzero().squeeze(1)
        if len(local) == 0:
            continue
        whole = torch.equal(local, torch.arange(part.size))
        parts.append(part if whole else restricted(part, local.to(index.device)))
        places.append(place[coordinates[local]])
    return BlockFeatures(parts, places)
