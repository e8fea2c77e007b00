"""Features ``Phi = J V``: the Jacobian in K directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import DenseFeatures, FeatureOperator
from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.feature_maps.directions import Directions
from curvlin_nn.feature_maps.jacobian import JacobianMap, rows_of_outputs
from curvlin_nn.feature_maps.recording import FeatureRecording
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.input_parts import in_parts

ROW_BUDGET = 2**23
"""Entries of the factors of a Jacobian held at once, where features are all that is asked for."""


class ProjectedMap(FeatureMap):
    """``x -> (f(x), J(x) V)``.

    Args:
        jacobian: J.
        directions: V.
    """

    def __init__(self, jacobian: JacobianMap, directions: Directions) -> None:
        self._jacobian, self._directions = jacobian, directions

    @property
    def size(self) -> int:
        """K."""
        return self._directions.size

    @property
    def jacobian(self) -> JacobianMap:
        """J, whose products the features are."""
        return self._jacobian

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """See `FeatureMap.output_shape`."""
        return self._jacobian.output_shape

    @outside_inference_mode()
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], DenseFeatures]:
        """See `FeatureMap.__call__`."""
        parts = [
            (f, self._directions.features(J))
            for f, J in in_parts(
                x,
                self._jacobian,
                n_samples=self.n_samples,
                entries=lambda found: sum(t.numel() for t, _ in found[1]._tensors()),
                budget=ROW_BUDGET,
            )
        ]
        return torch.cat([f for f, _ in parts]), DenseFeatures(torch.cat([Phi for _, Phi in parts]))

    @outside_inference_mode()
    def with_jacobian(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator, FeatureOperator]:
        """See `FeatureMap.with_jacobian`."""
        f, J = self._jacobian(x)
        J = J.to(torch.float64)
        return f, DenseFeatures(self._directions.features(J)), J

    def n_samples(self, x: Any) -> int:
        """See `FeatureMap.n_samples`; takes a forward pass."""
        return self._jacobian.n_samples(x)

    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "K S"]:
        """See `FeatureMap.project`."""
        return self._directions.project(weights) if self.orthonormal else super().project(weights)

    def tensors(self) -> Mapping[str, Tensor]:
        """See `FeatureMap.tensors`."""
        return self._directions.tensors()

    @outside_inference_mode()
    def record(self, x: Any, where: str = "the input") -> FeatureRecording:
        """See `FeatureMap.record`."""
        recording = self._jacobian.record(x, where)
        return FeatureRecording(
            recording.outputs, DenseFeatures(self._directions.features(rows_of_outputs(recording)))
        )
