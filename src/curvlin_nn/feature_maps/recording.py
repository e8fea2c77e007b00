"""Features in the place of a Jacobian: what a structure is told of a batch, for maps without layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import FeatureOperator
from curvlin_nn.capture import Block, Captures, Recording
from curvlin_nn.errors import OutputError
from curvlin_nn.parameters import ParameterSpace

if TYPE_CHECKING:
    from curvlin_nn.feature_maps.base import FeatureMap


@dataclass(frozen=True)
class FeatureRecording:
    """The outputs and features of one batch; see `curvlin_nn.capture.Recording`.

    Attributes:
        outputs: in the model's shape.
        features: one row for each output.
    """

    outputs: Float[Tensor, N * C]
    features: FeatureOperator

    @classmethod
    def checked(cls, outputs: object, features: object, size: int, where: str) -> FeatureRecording:
        """What a map answered, if it is what it should be.

        Raises:
            OutputError: if it is not.
        """
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.numel() == 0:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise OutputError(f"outputs of the feature map on {where} must have shape (N, C), found {found}")
        rows = outputs[0].numel()
        expected = (len(outputs), rows, size)
        if not isinstance(features, FeatureOperator) or features.shape != expected:
            found = (
                tuple(features.shape) if isinstance(features, FeatureOperator) else type(features).__name__
            )
            raise OutputError(
                f"features on {where} must be a FeatureOperator of shape {expected}, as (samples, outputs, K), "
                f"found {found}"
            )
        if not bool(torch.isfinite(outputs).all()):
            raise OutputError(f"outputs of the feature map on {where} must be finite, found NaN or Inf")
        return cls(outputs.detach(), features.detach())

    def ends_in(self, terms: Float[Tensor, "N R E"]) -> bool:
        """Whether the outputs are those of one chosen layer: features are of none."""
        return False

    def streamed(self, columns: Float[Tensor, "V N *C"], *, first: bool = True) -> Iterator[Captures]:
        """See `curvlin_nn.capture.Recording.streamed`; rows of features are short, and come at once."""
        yield self.captures(columns, first=first)

    def captures(self, columns: Float[Tensor, "V N *C"], *, first: bool = True) -> Captures:
        """The rows ``column^T Phi`` of every sample and column; see `curvlin_nn.capture.Recording.captures`."""
        S = columns.reshape(*columns.shape[:2], -1).movedim(0, 1)
        rows = (S.to(self.features.dtype) @ self.features).to_dense()
        return Captures(len(rows), (Block("features", 0, rows.unsqueeze(2), None),), first)


@dataclass(frozen=True)
class FeatureRecorder:
    """A feature map in the place of the recorder of a model.

    Attributes:
        model: the model that the map is of.
        feature_map: the map.
        space: its coordinates.
    """

    model: nn.Module
    feature_map: FeatureMap
    space: ParameterSpace

    @property
    def served(self) -> dict[str, str]:
        """Nothing is known of layers; see `curvlin_nn.capture.Recorder.served`."""
        return {}

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """See `FeatureMap.output_shape`."""
        return self.feature_map.output_shape

    def __call__(self, x: Any, where: str = "the input") -> Recording | FeatureRecording:
        """See `FeatureMap.record`."""
        return self.feature_map.record(x, where)
