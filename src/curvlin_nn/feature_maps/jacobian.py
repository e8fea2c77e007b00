"""The exact Jacobian in factored form, layer by layer; it is never multiplied out."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import BlockFeatures, DenseFeatures, FeatureOperator, KhatriRaoFeatures
from curvlin_nn.capture import Block, Captures, Recorder, last_layer
from curvlin_nn.capture.inputs import tensors_of
from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.parameters import ParameterSpace, Selection


class JacobianMap(FeatureMap):
    """``x -> (f(x), df/dtheta)`` by one forward pass and C backward passes that stop at the layers' outputs.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
        subset_of_weights: ``"all"``, names of parameters or modules, or a predicate.
        differentiable: whether outputs and features have gradients with respect to x (while autograd records).
    """

    def __init__(
        self, model: nn.Module, subset_of_weights: Selection = "all", *, differentiable: bool = False
    ) -> None:
        self._recorder = Recorder(model, ParameterSpace.of(model, subset_of_weights))
        self._differentiable = differentiable

    @classmethod
    def of(cls, recorder: Recorder, *, differentiable: bool = False) -> JacobianMap:
        """The map that records with `recorder`, sharing what it has verified."""
        jacobian = cls.__new__(cls)
        jacobian._recorder, jacobian._differentiable = recorder, differentiable
        return jacobian

    @property
    def space(self) -> ParameterSpace:
        """The parameters of the Jacobian's columns."""
        return self._recorder.space

    @outside_inference_mode()
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """See `FeatureMap.__call__`."""
        recording_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(x))
        recording = self._recorder(x, differentiable=self._differentiable and recording_gradients)
        outputs = recording.outputs.flatten(1) if recording.outputs.ndim > 1 else recording.outputs[:, None]
        n_samples, n_outputs = outputs.shape
        unit = torch.eye(n_outputs, dtype=outputs.dtype, device=outputs.device)
        captures = recording.captures(unit[:, None, :].expand(n_outputs, n_samples, n_outputs))
        return outputs, features(captures)

    def n_samples(self, x: Any) -> int:
        """See `FeatureMap.n_samples`; takes a forward pass."""
        return self._recorder.n_samples(x)


class LastLayerMap(FeatureMap):
    """The Jacobian with respect to the last layer that the forward pass uses; needs no backward pass.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._jacobian: JacobianMap | None = None

    @outside_inference_mode()
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """See `FeatureMap.__call__`."""
        if self._jacobian is None:
            self._jacobian = JacobianMap(self._model, last_layer(self._model, x).names)
        return self._jacobian(x)


def features(captures: Captures) -> BlockFeatures:
    """The rows of captures as features ``(N, V, P)``, in factored form."""
    return BlockFeatures([_features(block) for block in captures.blocks], captures.partition)


def _features(block: Block) -> FeatureOperator:
    if block.right is None:
        return DenseFeatures(block.left.squeeze(2))
    n_samples, n_positions, n_inputs = block.right.shape
    if n_inputs >= n_positions:
        return KhatriRaoFeatures(block.left, block.right)
    # More positions than inputs (a convolution of few channels over many pixels): the same rows, with the sum over
    # positions done and one position left for each input.
    summed = [left.mT @ block.right for left in block.left.unbind(1)]
    identity = torch.eye(n_inputs, dtype=block.right.dtype, device=block.right.device)
    return KhatriRaoFeatures(torch.stack(summed, dim=1).mT, identity.expand(n_samples, n_inputs, n_inputs))
