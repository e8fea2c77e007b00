"""Linear layers: ``y = x W^T + b`` over the last axis of x, or ``y = x W + b`` where the weight stands as (in, out).

Every other axis is a position: ``dL/dW = sum g (x) x`` and ``dL/db = sum g`` over positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlin_nn.capture.rules import Call, LayerRule, NotCovered, Piece, named, register


class Matrix(LayerRule):
    """What linear maps have in common.

    Attributes:
        transposed: whether the weight is (in, out).
    """

    batched_columns = True
    transposed: ClassVar[bool]

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""
        input, weight, bias = self.operands(*args, **kwargs)
        if weight.ndim != 2:
            raise NotCovered(f"with a weight of shape {tuple(weight.shape)}")
        out = weight.shape[1 if self.transposed else 0]
        if bias is not None and bias.shape != (out,):
            raise NotCovered(f"with a bias of shape {tuple(bias.shape)}")
        return Call(input, named(weight=weight, bias=bias))

    @abstractmethod
    def operands(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias."""

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        if "weight" in call.roles:
            yield Piece("weight", 0, gradient, call.input, self.transposed)
        if "bias" in call.roles:
            yield Piece("bias", 0, gradient, None)


@register
class LinearRule(Matrix):
    """`torch.nn.functional.linear`, and with it `torch.nn.Linear`."""

    functions = (F.linear,)
    transposed = False

    def operands(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Matrix.operands`."""

        def arguments(
            input: Tensor, weight: Tensor, bias: Tensor | None = None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            return input, weight, bias

        return arguments(*args, **kwargs)


@register
class MatmulRule(Matrix):
    """``x @ W`` and its other names; a product with the parameter on the left is not covered."""

    functions = (torch.matmul, Tensor.matmul, torch.mm, Tensor.mm)
    transposed = True

    def operands(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Matrix.operands`."""
        if len(args) != 2 or kwargs:
            raise NotCovered("with arguments by name")
        input, weight = args
        return input, weight, None


@register
class AddmmRule(Matrix):
    """``torch.addmm(b, x, W)``, as in the linear layers of GPT-2, which hold W as (in, out)."""

    functions = (torch.addmm, Tensor.addmm)
    transposed = True

    def operands(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Matrix.operands`."""
        if len(args) != 3 or kwargs:
            raise NotCovered("with factors, or arguments by name")
        bias, input, weight = args
        return input, weight, bias
