"""Finding the last layer of a model by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from curvlin_nn.capture.intercept import Interceptor
from curvlin_nn.capture.state import device_of, evaluation_mode, forward, random_state_kept
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace


def last_layer(model: nn.Module, x: Any) -> ParameterSpace:
    """The parameters of the last layer that the forward pass of `model` on `x` uses.

    Raises:
        UnsupportedError: if the pass uses no layer that has a rule.
    """
    leaves = {
        name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()
    }
    interceptor = Interceptor(leaves, strict=False)
    with evaluation_mode(model), random_state_kept(device_of(model)), torch.enable_grad(), interceptor:
        forward(model, leaves, x)
    if not interceptor.uses:
        raise UnsupportedError(
            "subset_of_weights='last_layer' found no linear or convolutional layer in the forward pass; "
            "name the layer instead, as in subset_of_weights=['head']"
        )
    return ParameterSpace.of(model, list(interceptor.uses[-1].names.values()))
