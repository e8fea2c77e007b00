"""Convolutions in one to three dimensions, as linear layers over patches.

Each output pixel is a position; its right factor is the patch of the (explicitly padded) input under the
kernel. With G groups the weight is G contiguous blocks that see different channels and share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlin_nn.capture.patches import Patches, Sizes
from curvlin_nn.capture.rules import Call, LayerRule, NotServable, Piece, named, register


@register
class ConvRule(LayerRule):
    """`torch.nn.functional.conv1d`, `conv2d` and `conv3d`, and their modules: any stride, padding, dilation and groups.

    Padding modes other than zeros are applied by the module before the function is called, so the captured
    input already holds them.
    """

    functions = (F.conv1d, F.conv2d, F.conv3d)
    batched_columns = False  # convolution kernels gain nothing from a further batch axis, and copy

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: int | Sizes = 1,
            padding: int | str | Sizes = 0,
            dilation: int | Sizes = 1,
            groups: int = 1,
        ) -> Call:
            options = geometry(input, weight, stride, padding, dilation, groups)
            return Call(input, named(weight=weight, bias=bias), options)

        return arguments(*args, **kwargs)

    def by_position(self, call: Call, gradient: Tensor) -> Tensor:
        """See `LayerRule.by_position`."""
        return gradient.movedim(2, -1)

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        g = self.by_position(call, gradient)
        groups = call.options["groups"]
        out = g.shape[-1] // groups
        if "weight" in call.roles and groups == 1 and not torch.is_grad_enabled():
            yield Piece("weight", 0, g, None, compact=self._patches(call))
        elif "weight" in call.roles:
            for group, patch in enumerate(self._patches(call).written_out.chunk(groups, dim=-1)):
                left = g[..., group * out : (group + 1) * out]
                yield Piece("weight", group * out * patch.shape[-1], left, patch)
        if "bias" in call.roles:
            yield Piece("bias", 0, g, None)

    def _patches(self, call: Call) -> Patches:
        """What each output pixel sees; groups stand side by side."""
        if torch.is_grad_enabled():  # with a graph that must not outlive this call
            return self._of_input(call, call.input)
        if "patches" not in call.memo:
            call.memo["patches"] = self._of_input(call, call.input.detach())
        return call.memo["patches"]

    def _of_input(self, call: Call, images: Tensor) -> Patches:
        kernel, stride, padding, dilation = (
            call.options[key] for key in ("kernel", "stride", "padding", "dilation")
        )
        return Patches(images, kernel, stride, dilation, _pairs(padding, kernel, dilation))


def geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | Sizes,
    padding: int | str | Sizes,
    dilation: int | Sizes,
    groups: int,
) -> dict[str, Any]:
    """Where the kernel meets the images, as the options of a call.

    Raises:
        NotServable: if the input has no axis for samples.
    """
    if input.ndim != weight.ndim:
        raise NotServable(
            f"on an input {tuple(input.shape)} without an axis for samples", "one with samples along axis 0"
        )
    kernel = tuple(weight.shape[2:])
    return {
        "kernel": kernel,
        "stride": _sizes(stride, len(kernel)),
        "padding": padding if isinstance(padding, str) else _sizes(padding, len(kernel)),
        "dilation": _sizes(dilation, len(kernel)),
        "groups": groups,
    }


def _sizes(value: int | Sequence[int], ndim: int) -> Sizes:
    """One number for each spatial axis, of which one may be given for all."""
    if isinstance(value, int):
        return (value,) * ndim
    return tuple(value) * (ndim // len(value))


def _pairs(padding: str | Sizes, kernel: Sizes, dilation: Sizes) -> tuple[tuple[int, int], ...]:
    """Zeros before and behind the image along each axis."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # an odd total puts the larger half after the image, as torch does
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(size), int(size)) for size in padding)
