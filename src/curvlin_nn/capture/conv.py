"""Convolutions in one to three dimensions, as linear layers over patches.

Each output pixel is a position; its right factor is the patch of the (explicitly padded) input under the
kernel. With G groups the weight is G contiguous blocks that see different channels and share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture.rules import Call, LayerRule, NotServable, Piece, named, register

Sizes = tuple[int, ...]
"""One number for each spatial axis."""


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
            ndim = check_batched(input, weight)
            options = {
                "kernel": tuple(weight.shape[2:]),
                "stride": sizes(stride, ndim),
                "padding": padding if isinstance(padding, str) else sizes(padding, ndim),
                "dilation": sizes(dilation, ndim),
                "groups": groups,
            }
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
        if "weight" in call.roles:
            for group, patch in enumerate(self._patches(call).chunk(groups, dim=-1)):
                left = g[..., group * out : (group + 1) * out]
                yield Piece("weight", group * out * patch.shape[-1], left, patch)
        if "bias" in call.roles:
            yield Piece("bias", 0, g, None)

    def _patches(self, call: Call) -> Float[Tensor, "N *output K"]:
        """What each output pixel sees, in the order of the flattened weight; groups stand side by side."""
        if torch.is_grad_enabled():  # with a graph that must not outlive this call
            return self._unfolded(call)
        if "patches" not in call.memo:
            call.memo["patches"] = self._unfolded(call)
        return call.memo["patches"]

    def _unfolded(self, call: Call) -> Float[Tensor, "N *output K"]:
        kernel, stride, padding, dilation = (
            call.options[key] for key in ("kernel", "stride", "padding", "dilation")
        )
        return patches(_padded(call.input, kernel, padding, dilation), kernel, stride, dilation)


def patches(
    image: Float[Tensor, "N C *input"], kernel: Sizes, stride: Sizes, dilation: Sizes
) -> Float[Tensor, "N *output CK"]:
    """Where the kernel fits into the image, what lies under it; channels vary slowest."""
    windows = image
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    ndim = len(kernel)
    places = windows.shape[2 : 2 + ndim]
    # One copy, in runs of the image's own rows: several times as fast as torch's im2col.
    columns = windows.permute(0, 1, *range(2 + ndim, 2 + 2 * ndim), *range(2, 2 + ndim))
    return columns.reshape(len(image), image.shape[1] * math.prod(kernel), math.prod(places)).mT.unflatten(
        1, places
    )


def check_batched(input: Tensor, weight: Tensor) -> int:
    """The number of spatial axes, if the input has an axis for samples.

    Raises:
        NotServable: if it has none.
    """
    if input.ndim != weight.ndim:
        raise NotServable(
            f"on an input {tuple(input.shape)} without an axis for samples", "one with samples along axis 0"
        )
    return weight.ndim - 2


def sizes(value: int | Sequence[int], ndim: int) -> Sizes:
    """One number for each spatial axis, of which one may be given for all."""
    if isinstance(value, int):
        return (value,) * ndim
    return tuple(value) * (ndim // len(value))


def _padded(image: Tensor, kernel: Sizes, padding: str | Sizes, dilation: Sizes) -> Tensor:
    if padding == "valid":
        return image
    if padding == "same":  # an odd total puts the larger half after the image, as torch does
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(size), int(size)) for size in padding]
    return F.pad(image, [size for pair in reversed(pairs) for size in pair])
