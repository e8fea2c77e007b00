"""The exact Jacobian in factored form, layer by layer; it is never multiplied out."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import BlockFeatures, DenseFeatures, FeatureOperator, KhatriRaoFeatures
from curvlin_nn.capture import Block, Captures, Recorder, Recording, last_layer
from curvlin_nn.capture.inputs import tensors_of
from curvlin_nn.errors import NotFittedError
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

    orthonormal = True

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
    def model(self) -> nn.Module:
        """The model that is linearised."""
        return self._recorder.model

    @property
    def space(self) -> ParameterSpace:
        """The parameters of the Jacobian's columns."""
        return self._recorder.space

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.space.size

    @property
    def jacobian(self) -> JacobianMap:
        """The map itself."""
        return self

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """See `FeatureMap.output_shape`."""
        return self._recorder.output_shape

    @outside_inference_mode()
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """See `FeatureMap.__call__`."""
        recording_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(x))
        recording = self._recorder(x, differentiable=self._differentiable and recording_gradients)
        outputs = recording.outputs.flatten(1) if recording.outputs.ndim > 1 else recording.outputs[:, None]
        return outputs, rows_of_outputs(recording)

    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "P S"]:
        """See `FeatureMap.project`: the weights themselves."""
        return weights

    def record(self, x: Any, where: str = "the input") -> Recording:
        """See `FeatureMap.record`: rows by layers."""
        return self._recorder(x, where)

    def n_samples(self, x: Any) -> int:
        """See `FeatureMap.n_samples`; takes a forward pass."""
        return self._recorder.n_samples(x)


class LastLayerMap(FeatureMap):
    """The Jacobian with respect to the last layer that the forward pass uses; needs no backward pass.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
    """

    orthonormal = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._jacobian: JacobianMap | None = None

    @property
    def jacobian(self) -> JacobianMap:
        """The Jacobian with respect to the last layer.

        Raises:
            NotFittedError: before the map has seen an input, which tells the last layer.
        """
        if self._jacobian is None:
            raise NotFittedError("the last layer is not known yet; call this LastLayerMap on an input first")
        return self._jacobian

    @property
    def space(self) -> ParameterSpace:
        """The parameters of the last layer."""
        return self.jacobian.space

    @property
    def size(self) -> int:
        """The number of parameters of the last layer."""
        return self.space.size

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """See `FeatureMap.output_shape`."""
        return None if self._jacobian is None else self._jacobian.output_shape

    @outside_inference_mode()
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """See `FeatureMap.__call__`."""
        return self._found(x, "the input")(x)

    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "P S"]:
        """See `FeatureMap.project`: the weights themselves."""
        return weights

    def record(self, x: Any, where: str = "the input") -> Recording:
        """See `FeatureMap.record`: rows by layers."""
        return self._found(x, where).record(x, where)

    def _found(self, x: Any, where: str) -> JacobianMap:
        if self._jacobian is None:
            self._jacobian = JacobianMap(self._model, last_layer(self._model, x, where).names)
        return self._jacobian


def rows_of_outputs(recording: Recording) -> BlockFeatures:
    """The Jacobian of the outputs of a forward pass: one row for each."""
    n_samples, n_outputs = len(recording.outputs), recording.outputs[0].numel()
    unit = torch.eye(n_outputs, dtype=recording.outputs.dtype, device=recording.outputs.device)
    return features(recording.captures(unit[:, None, :].expand(n_outputs, n_samples, n_outputs)))


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
