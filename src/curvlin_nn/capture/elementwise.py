"""Parameters that scale or shift: ``y = w * x`` and ``y = x + w``, with w broadcast against x.

    scale       sum over positions of g * x
    shift       sum over positions of g

The axes along which w is broadcast are positions, the others its features: the axis of samples is among the former.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlin_nn.capture.rules import Call, LayerRule, NotCovered, Piece, register


class _Elementwise(LayerRule):
    """What both have in common. Of two parameters, the smaller one is served."""

    batched_columns = True
    is_layer = False

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""
        if len(args) != 2 or kwargs or not all(isinstance(operand, Tensor) for operand in args):
            raise NotCovered("with a number, or arguments by name")
        if args[0].dtype != args[1].dtype:
            raise NotCovered(f"of {args[0].dtype} and {args[1].dtype}")
        weight, other = sorted(args, key=lambda t: (not _is_parameter(t), t.ndim, t.numel()))
        shape = torch.broadcast_shapes(weight.shape, other.shape)
        own = (1,) * (len(shape) - weight.ndim) + tuple(weight.shape)
        features = [axis for axis, size in enumerate(own) if size > 1]
        positions = [axis for axis, size in enumerate(own) if size == 1]
        if not positions:
            raise NotCovered("without being broadcast")
        return Call(
            other, {"weight": weight}, {"axes": (*positions, *features), "n_positions": len(positions)}
        )

    def by_position(self, call: Call, gradient: Tensor) -> Tensor:
        """See `LayerRule.by_position`."""
        moved = gradient.permute(0, *(axis + 1 for axis in call.options["axes"]))
        return moved.reshape(*moved.shape[: 1 + call.options["n_positions"]], -1)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is a leaf of the graph, or a view of one."""
    base = tensor._base if tensor._is_view() else tensor
    return tensor.requires_grad and base is not None and base.is_leaf


@register
class ScaleRule(_Elementwise):
    """``w * x``."""

    functions = (torch.mul, Tensor.mul)

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        yield Piece("weight", 0, self.by_position(call, gradient * call.input), None)


@register
class ShiftRule(_Elementwise):
    """``x + w``, and ``x += w``."""

    functions = (torch.add, Tensor.add, Tensor.add_)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""
        call = super().bind(*args, **kwargs)
        return Call(
            call.roles["weight"], call.roles, call.options
        )  # what it is added to may change: it is not needed

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        yield Piece("weight", 0, self.by_position(call, gradient), None)
