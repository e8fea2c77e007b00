"""Two-dimensional convolutions, as linear layers over patches.

Each output pixel is a position; its right factor is the patch of the (explicitly padded) input under the
kernel. With G groups the weight is G contiguous blocks that see different channels and share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture.rules import Call, LayerRule, Piece, register
from curvlin_nn.errors import UnsupportedError


@register
class Conv2dRule(LayerRule):
    """`torch.nn.functional.conv2d`, and with it `torch.nn.Conv2d`: any stride, padding, dilation and groups.

    Padding modes other than zeros are applied by the module before the function is called, so the captured
    input already holds them.
    """

    functions = (F.conv2d,)
    batched_columns = False  # convolution kernels gain nothing from a further batch axis, and copy

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: int | tuple[int, ...] = 1,
            padding: int | str | tuple[int, ...] = 0,
            dilation: int | tuple[int, ...] = 1,
            groups: int = 1,
        ) -> Call:
            options = {
                "kernel": tuple(weight.shape[2:]),
                "stride": _pair(stride),
                "padding": padding if isinstance(padding, str) else _pair(padding),
                "dilation": _pair(dilation),
                "groups": groups,
            }
            return Call(
                input, {"weight": weight} if bias is None else {"weight": weight, "bias": bias}, options
            )

        return arguments(*args, **kwargs)

    def by_position(self, gradient: Tensor) -> Tensor:
        """See `LayerRule.by_position`."""
        return gradient.movedim(2, -1)

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        if call.input.ndim != 4:
            raise UnsupportedError(
                "conv2d needs a batch of images (N, C, H, W), found an input of shape "
                f"{tuple(call.input.shape)}"
            )
        g = self.by_position(gradient)
        groups = call.options["groups"]
        out = g.shape[-1] // groups
        for group, patch in enumerate(_patches(call)):
            left = g[..., group * out : (group + 1) * out]
            yield Piece("weight", group * out * patch.shape[-1], left, patch)
        if "bias" in call.roles:
            yield Piece("bias", 0, g, None)


def _patches(call: Call) -> tuple[Float[Tensor, "N H W K"], ...]:
    """What each output pixel sees of each group's channels, in the order of the flattened weight."""
    kernel, stride, dilation = (call.options[key] for key in ("kernel", "stride", "dilation"))
    padded = F.pad(call.input, _explicit_padding(call.options["padding"], kernel, dilation))
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    )
    columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)
    by_position = columns.mT.reshape(columns.shape[0], height, width, columns.shape[1])
    return torch.chunk(by_position, call.options["groups"], dim=-1)


def _explicit_padding(
    padding: str | tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The argument of `F.pad`: (left, right, top, bottom)."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":  # an odd total puts the larger half after the image, as torch does
        vertical, horizontal = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        top, left = vertical // 2, horizontal // 2
        return (left, horizontal - left, top, vertical - top)
    top, left = (int(size) for size in padding)
    return (left, left, top, top)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value, value)
    return tuple(value) * (2 // len(value))
