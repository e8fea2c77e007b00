"""A last layer that a model applies at several positions, of whose outputs it takes one, or the mean.

So do language models with a classification head: the head sees the hidden state of every token, and one output counts.
A linear map commutes with that, so the outputs are those of one reduced hidden state, ``f = W phi + b``, and KFAC's
input factor is that of ``phi`` instead of that of all tokens. The positions are found without being told as well; what
this changes is that the others no longer count as inputs of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from curvlin_nn.capture.checks import close
from curvlin_nn.capture.intercept import Use
from curvlin_nn.capture.linear import LinearRule
from curvlin_nn.errors import UnsupportedError, one_of

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pick_first": lambda features: features[:, 0],
    "pick_last": lambda features: features[:, -1],
    "average": lambda features: features.mean(1),
}
"""``(N, S, D) -> (N, D)``, by the names that laplace-torch gives them."""


def check_reduction(feature_reduction: str | None) -> str | None:
    """Whether there is such a reduction: the argument, as it is.

    Raises:
        UnsupportedError: if there is not.
    """
    if feature_reduction is not None and feature_reduction not in REDUCTIONS:
        raise UnsupportedError(
            f"feature_reduction={feature_reduction!r} is not supported; expected None or {one_of(REDUCTIONS)}"
        )
    return feature_reduction


def reduced(uses: Sequence[Use], outputs: Tensor, feature_reduction: str, where: str) -> Use:
    """The only use, as one of the reduced features whose outputs are the model's.

    Raises:
        UnsupportedError: if it is not the only one, not by a linear layer, or not what the model computes.
    """
    wanted = f"feature_reduction={feature_reduction!r}"
    if len(uses) != 1 or not isinstance(uses[0].rule, LinearRule):
        names = [name for use in uses for name in use.names]
        raise UnsupportedError(
            f"{wanted} needs the chosen parameters to be one linear layer that is used once, found uses of {names}; "
            "take subset_of_weights='last_layer', or feature_reduction=None"
        )
    (use,) = uses
    features = use.call.input
    if features.ndim > 2:
        features = REDUCTIONS[feature_reduction](features.flatten(1, -2))
    found = F.linear(features, use.call.roles["weight"], use.call.roles.get("bias"))
    if found.shape != outputs.shape or not close(outputs, found):
        raise UnsupportedError(
            f"{wanted} is not what the model does on {where}: its outputs are not those of its last layer on features "
            f"{tuple(use.call.input.shape)} so reduced; name what it does, or take feature_reduction=None"
        )
    return replace(use, call=replace(use.call, input=features), shape=found.shape, version=features._version)
