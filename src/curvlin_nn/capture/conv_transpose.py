"""Transposed convolutions in one to three dimensions: a convolution with input and output in each other's place.

Each *input* pixel is a position: it adds its channels times the kernel to the patch of the output that it reaches.

    y[patch(p)] += W^T x[p]      left = the gradient on patch(p), right = x[p], and W stands as (in, out)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture.conv import geometry
from curvlin_nn.capture.patches import Sizes, cut_out, zero_padded
from curvlin_nn.capture.rules import Call, LayerRule, Piece, named, register


@register
class ConvTransposeRule(LayerRule):
    """`torch.nn.functional.conv_transpose1d`, `2d` and `3d`, and their modules, with all their options."""

    functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    batched_columns = False  # as for convolutions

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: int | Sizes = 1,
            padding: int | Sizes = 0,
            output_padding: int | Sizes = 0,
            groups: int = 1,
            dilation: int | Sizes = 1,
        ) -> Call:
            options = geometry(input, weight, stride, padding, dilation, groups)
            return Call(input, named(weight=weight, bias=bias), options)

        return arguments(*args, **kwargs)

    def by_position(self, call: Call, gradient: Tensor) -> Tensor:
        """See `LayerRule.by_position`."""
        # Pixels of the input are not those of the output: neither is a position here.
        return gradient.flatten(2)

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        if "weight" in call.roles:
            groups = call.options["groups"]
            rights = call.input.movedim(1, -1).chunk(groups, dim=-1)
            lefts = self._patches(call, gradient).chunk(groups, dim=-1)
            for group, (left, right) in enumerate(zip(lefts, rights, strict=True)):
                yield Piece("weight", group * left.shape[-1] * right.shape[-1], left, right, transposed=True)
        if "bias" in call.roles:
            yield Piece("bias", 0, gradient.flatten(3).sum(-1), None)

    def _patches(self, call: Call, gradient: Tensor) -> Float[Tensor, "V N *input K"]:
        """The gradient on what each input pixel reaches; what would lie outside of the output does not exist."""
        kernel, stride, padding, dilation = (
            call.options[key] for key in ("kernel", "stride", "padding", "dilation")
        )
        reached = [
            (size - 1) * s + d * (k - 1) + 1
            for size, k, s, d in zip(call.input.shape[2:], kernel, stride, dilation, strict=True)
        ]
        pairs = tuple(
            (before, total - before - size)
            for before, total, size in zip(padding, reached, gradient.shape[3:], strict=True)
        )
        images = zero_padded(gradient.flatten(0, 1), pairs)
        return cut_out(images, kernel, stride, dilation).unflatten(0, gradient.shape[:2])
