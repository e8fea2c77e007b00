"""What a kernel sees of a sample: its input as a flat vector, with or without what the last layer is given.

The outputs come from the same forward pass, and are the network's own: `curvlin_nn.variational.FMGP` leaves the mean
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvlin_nn.capture.checks import checked_outputs
from curvlin_nn.capture.detours import compiled_code_as_written
from curvlin_nn.capture.inputs import only_tensor, tensors_of
from curvlin_nn.capture.state import (
    attributes_kept,
    device_of,
    evaluation_mode,
    forward,
    prepared,
    random_state_kept,
)
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.input_parts import cut

AT_ONCE = 100
"""Samples that the network is run on at a time before the training."""


@dataclass(frozen=True)
class Seen:
    """A forward pass.

    Attributes:
        outputs: in the model's shape and dtype.
        points: what the kernel takes, in float64.
        n_inputs: how many entries of a point are the flat input.
    """

    outputs: Float[Tensor, N * T]
    points: Float[Tensor, "N D"]
    n_inputs: int

    @property
    def rows(self) -> Float[Tensor, "N C"]:
        """The outputs, flat."""
        return self.outputs.reshape(len(self.outputs), -1)


@dataclass(frozen=True)
class Points:
    """``x -> (f(x), points)``, without gradients; the model comes back as it was.

    Attributes:
        model: the network.
        with_last_layer: whether the input of the last layer, and 1 if that has a bias, stand behind the flat input.
    """

    model: nn.Module
    with_last_layer: bool

    def __call__(self, x: Any, where: str = "the input") -> Seen:
        """Outputs and points of some samples.

        Raises:
            DataError: if x does not hold one tensor of samples with real numbers.
            OutputError: if outputs are not finite, or not one row for each sample.
            UnsupportedError: if the last layer is wanted and the outputs are not what a linear layer returned.
        """
        x = prepared(self.model, x, where)
        points = self.sample_tensor(x, where)
        points = points.detach().reshape(len(points), -1).double()
        if not bool(torch.isfinite(points).all()):
            raise DataError(f"{where} must be finite, found Inf among the inputs")
        watch = _LinearLayers()
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            evaluation_mode(self.model),
            attributes_kept(self.model),
            compiled_code_as_written(),
            random_state_kept(device_of(self.model)),
            watch if self.with_last_layer else nullcontext(),
        ):
            outputs = checked_outputs(forward(self.model, {}, x, where), where)
        if len(outputs) != len(points):
            raise OutputError(
                f"model outputs on {where} must have one row for each of {len(points)} samples, found {len(outputs)}"
            )
        n_inputs = points.shape[1]
        if self.with_last_layer:
            points = torch.cat([points, watch.input_of(outputs, where)], dim=1)
        return Seen(outputs, points, n_inputs)

    @staticmethod
    def sample_tensor(x: Any, where: str) -> Float[Tensor, N * S]:
        """The tensor that samples are points by: x, or the only one in it.

        Raises:
            DataError: if there is no such tensor.
        """
        tensor = only_tensor(x)
        if tensor is None or tensor.ndim == 0 or tensor.is_complex():
            found = f"{type(x).__name__} of {sum(1 for _ in tensors_of(x))} tensors"
            if tensor is not None:
                found = f"shape {tuple(tensor.shape)} of {tensor.dtype}"
            raise DataError(
                f"{where} must be one tensor of real numbers with samples along axis 0, as kernels of inputs take, "
                f"found {found}"
            )
        return tensor

    def in_parts(self, x: Any, where: str) -> Seen:
        """The same for many samples, some at a time: what a training asks for, and not who calls the model."""
        parts = [self(some, where) for some, _ in cut(x, len(self.sample_tensor(x, where)), AT_ONCE)]
        return Seen(
            torch.cat([part.outputs for part in parts]),
            torch.cat([part.points for part in parts]),
            parts[0].n_inputs,
        )


class _Call:
    """A linear layer's input and result."""

    def __init__(self, input: Tensor, has_bias: bool, result: Tensor) -> None:
        self.input, self.has_bias, self._result = input, has_bias, result
        self._versions = input._version, result._version

    def is_of(self, outputs: Tensor) -> bool:
        """Whether the outputs are the result, for one row of each sample, and nothing was written over."""
        return (
            self._versions == (self.input._version, self._result._version)
            and self.input.ndim == outputs.ndim == 2
            and torch.equal(self._result, outputs)
        )


class _LinearLayers(TorchFunctionMode):
    """While active, remembers the latest call of `torch.nn.functional.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: _Call | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            call = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self._latest = _Call(call["input"], call.get("bias") is not None, result)
        return result

    def input_of(self, outputs: Float[Tensor, N * T], where: str) -> Float[Tensor, "N E"]:
        """``[h, 1]``, or h where the layer has no bias: ``df_c / dW_c'`` is ``delta_cc'`` times that.

        Raises:
            UnsupportedError: if the outputs are not what the latest layer returned for one row of each sample.
        """
        call = self._latest
        if call is not None and call.is_of(outputs):
            h = call.input.double()
            return F.pad(h, (0, 1), value=1.0) if call.has_bias else h
        raise UnsupportedError(
            f"kernel='rbf_x_last_layer' needs outputs that are those of a linear layer with one row for each sample, "
            f"and found others on {where}; take kernel='rbf', or let the model return its logits"
        )
