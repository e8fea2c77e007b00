"""Affine normalisations: ``y = w * x_hat + b``, with x_hat computed from the input and never from the output.

    weight      sum over positions of g * x_hat
    bias        sum over positions of g

Both are rows that are summed already: there is no second factor, and curvature blocks are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvlin_nn.capture.rules import Call, LayerRule, NotCovered, Piece, named, register


class _Norm(LayerRule):
    """What normalisations have in common: the option ``"normalised"`` gives x_hat."""

    batched_columns = True
    is_layer = False

    def pieces(self, call: Call, gradient: Tensor) -> Iterator[Piece]:
        """See `LayerRule.pieces`."""
        if "weight" in call.roles:
            x_hat = call.options["normalised"](call.input)
            yield Piece("weight", 0, self.by_position(call, gradient * x_hat), None)
        if "bias" in call.roles:
            yield Piece("bias", 0, self.by_position(call, gradient), None)


class _TrailingNorm(_Norm):
    """Statistics and parameters over the last axes."""

    def by_position(self, call: Call, gradient: Tensor) -> Tensor:
        """See `LayerRule.by_position`."""
        return gradient.flatten(-call.options["ndim"])


class _ChannelNorm(_Norm):
    """One parameter for each channel, which is axis 1."""

    def by_position(self, call: Call, gradient: Tensor) -> Tensor:
        """See `LayerRule.by_position`."""
        return gradient.movedim(2, -1)


@register
class LayerNormRule(_TrailingNorm):
    """`torch.nn.functional.layer_norm`, and with it `torch.nn.LayerNorm`."""

    functions = (F.layer_norm,)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            normalized_shape: Sequence[int],
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            eps: float = 1e-5,
        ) -> Call:
            normalised = functools.partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
            options = {"normalised": normalised, "ndim": len(normalized_shape)}
            return Call(input, named(weight=weight, bias=bias), options)

        return arguments(*args, **kwargs)


@register
class RMSNormRule(_TrailingNorm):
    """`torch.nn.functional.rms_norm`, and with it `torch.nn.RMSNorm`."""

    functions = (F.rms_norm,)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            normalized_shape: Sequence[int],
            weight: Tensor | None = None,
            eps: float | None = None,
        ) -> Call:
            normalised = functools.partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
            return Call(
                input, named(weight=weight), {"normalised": normalised, "ndim": len(normalized_shape)}
            )

        return arguments(*args, **kwargs)


@register
class GroupNormRule(_ChannelNorm):
    """`torch.nn.functional.group_norm`, and with it `torch.nn.GroupNorm`."""

    functions = (F.group_norm,)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            num_groups: int,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            eps: float = 1e-5,
        ) -> Call:
            normalised = functools.partial(F.group_norm, num_groups=num_groups, eps=eps)
            return Call(input, named(weight=weight, bias=bias), {"normalised": normalised})

        return arguments(*args, **kwargs)


@register
class InstanceNormRule(_ChannelNorm):
    """`torch.nn.functional.instance_norm`, and with it `torch.nn.InstanceNorm1d`, `2d` and `3d`."""

    functions = (F.instance_norm,)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            running_mean: Tensor | None = None,
            running_var: Tensor | None = None,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            use_input_stats: bool = True,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Call:
            normalised = functools.partial(
                F.instance_norm,
                running_mean=None if use_input_stats else running_mean,
                running_var=None if use_input_stats else running_var,
                use_input_stats=use_input_stats,
                eps=eps,
            )
            return Call(input, named(weight=weight, bias=bias), {"normalised": normalised})

        return arguments(*args, **kwargs)


@register
class BatchNormRule(_ChannelNorm):
    """`torch.nn.functional.batch_norm` with running statistics, and with it `torch.nn.BatchNorm1d`, `2d` and `3d`."""

    functions = (F.batch_norm,)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """See `LayerRule.bind`."""

        def arguments(
            input: Tensor,
            running_mean: Tensor | None,
            running_var: Tensor | None,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Call:
            if training:
                raise NotCovered("with statistics of the batch")
            normalised = functools.partial(
                F.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps
            )
            return Call(input, named(weight=weight, bias=bias), {"normalised": normalised})

        return arguments(*args, **kwargs)
