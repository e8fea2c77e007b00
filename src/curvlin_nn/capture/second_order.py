"""Whether captures can be differentiated once more: the derivative of a Jacobian takes two of each operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from curvlin_nn.capture.course import nodes_behind
from curvlin_nn.errors import UnsupportedError


@once_differentiable
def _once(ctx: Any, *gradients: Tensor) -> None: ...


def check_differentiable(
    outputs: Tensor, captures: Iterable[Tensor], inputs: Sequence[Tensor], where: str
) -> None:
    """Whether every operation between inputs and captures has a second derivative, by taking it once.

    Where a hand-written backward pass is marked to have none, torch may leave it out without a word.

    Args:
        outputs: the model's outputs.
        captures: factors of their Jacobian.
        inputs: what to differentiate by.
        where: what to call the input in error messages.

    Raises:
        UnsupportedError: naming an operation that has none.
    """
    for node in nodes_behind(outputs.grad_fn):
        if _is_marked(node):
            raise _refusal(f"{node.name()}, whose backward pass is once_differentiable,", where)
    total = torch.stack(
        [factor.sum() for factor in captures if factor.requires_grad] or [outputs.sum()]
    ).sum()
    try:
        torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise _refusal(f"one of which torch says: {reason},", where) from error


def _refusal(found: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"enable_backprop=True needs operations that can be differentiated twice, found {found} on {where}; replace "
        "it in the model, or predict without gradients (enable_backprop=False)"
    )


def _is_marked(node: Node) -> bool:
    """Whether it is a hand-written one whose backward pass is `once_differentiable`."""
    if not isinstance(node, BackwardCFunction):
        return False
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _once.__code__
