"""Linear layers: ``y = x W^T + b`` over the last axis of x.

Every other axis is a position: ``dL/dW = sum g (x) x`` and ``dL/db = sum g`` over positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvlin_nn.capture.rules import Call, LayerRule, Piece, register
from curvlin_nn.errors import UnsupportedError


@register
class LinearRule(LayerRule):
    """`torch.nn.functional.linear`, and with it `torch.nn.Linear`."""

    functions = (F.linear,)
    batched_columns = True

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
            if weight.ndim != 2:
                raise UnsupportedError(
                    f"linear needs a weight (out, in), found shape {tuple(weight.shape)}; give it one row"
                )
            return Call(input, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})

        return arguments(*args, **kwargs)

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        yield Piece("weight", 0, gradient, call.input)
        if "bias" in call.roles:
            yield Piece("bias", 0, gradient, None)
