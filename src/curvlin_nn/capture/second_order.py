"""Whether captures can be differentiated once more: the derivative of a Jacobian takes two of each operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from curvlin_nn.errors import UnsupportedError

_REFUSING = ("torch::autograd::NotImplemented", "torch::autograd::Error")
"""Nodes that torch puts where a derivative has none."""


@once_differentiable
def _once(ctx: Any, *gradients: Tensor) -> None: ...


def check_differentiable(tensors: Iterable[Tensor], where: str) -> None:
    """Whether every operation behind captures and outputs has a second derivative.

    Torch says so when the gradient is taken, or where a hand-written backward pass is marked to have none, not at all.

    Args:
        tensors: outputs and captures.
        where: what to call the input in error messages.

    Raises:
        UnsupportedError: naming an operation that has none.
    """
    waiting = [tensor.grad_fn for tensor in tensors]
    seen: set[Node | None] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        following = [child for child, _ in node.next_functions]
        if any(child is not None and child.name() in _REFUSING for child in following) or _is_marked(node):
            raise UnsupportedError(
                f"enable_backprop=True needs operations that can be differentiated twice, found {node.name()} on "
                f"{where}; replace it in the model, or predict without gradients (enable_backprop=False)"
            )
        waiting += following


def _is_marked(node: Node) -> bool:
    """Whether it is a hand-written one whose backward pass is `once_differentiable`."""
    if not isinstance(node, BackwardCFunction):
        return False
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _once.__code__
