"""`torch.inference_mode` around this library: its tensors know no autograd, so none is kept or computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Ordinary tensors are made inside, gradients recorded or not as the caller has it; also a decorator."""
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or an ordinary copy of a tensor of inference mode."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor
