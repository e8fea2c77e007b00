"""The weight of a layer and its bias as one matrix ``[W b]``, whose input is ``(a, 1)`` at every position.

So one Kronecker product holds their products too (Martens & Grosse, 2015). It treats the bias as it does the weight:
with several positions, products of different positions are dropped (expand) or averaged (reduce).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from curvlin_nn.capture import Block, JointBlock
from curvlin_nn.errors import UnsupportedError


def joint(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks with every bias joined to the weight of its module, ``weight`` to ``bias`` by name.

    Parameters whose rows have no factors (scales of a normalisation, what autodiff serves) stay as they are, and so
    does a weight or bias without the other.

    Raises:
        UnsupportedError: if a weight and its bias are not used at the same positions and have no common input: by other
            calls, or in a transposed convolution, where those of the weight are input pixels.
    """
    by_name: dict[str, list[Block]] = {}
    for block in map(Block.without_patches, blocks):
        by_name.setdefault(block.parameter, []).append(block)
    joined: dict[str, list[Block]] = {}
    for name, weights in by_name.items():
        biases = by_name.get(_partner(name), [])
        if name.endswith("weight") and biases and all(weight.right is not None for weight in weights):
            joined[name], joined[_partner(name)] = list(_joined(weights, biases)), []
    return tuple(block for name, own in by_name.items() for block in joined.get(name, own))


def _partner(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _joined(weights: Sequence[Block], biases: Sequence[Block]) -> Iterator[Block]:
    """A block for each part of the weight, such as a group of a convolution, with its part of the bias."""
    b, start = torch.cat([bias.left for bias in biases], dim=-1), biases[0].start
    ends = torch.tensor([weight.shape[0] for weight in weights]).cumsum(0).tolist()
    if ends[-1] != b.shape[-1] or any(bias.right is not None for bias in biases):
        raise _apart(weights[0].parameter)
    for weight, end in zip(weights, ends, strict=True):
        first = end - weight.shape[0]
        if weight.uses or not _same_uses(weight, b[..., first:end]):
            raise _apart(weight.parameter)
        assert weight.right is not None
        yield JointBlock(
            weight.parameter,
            weight.start,
            weight.left,
            F.pad(weight.right, (0, 1), value=1.0),
            weight.transposed,
            bias=start + first,
        )


def _same_uses(weight: Block, bias: torch.Tensor) -> bool:
    """Whether the gradient of the bias is that of the layer's output summed over the weight's positions."""
    summed, size = weight.left.double().sum(2, keepdim=True), weight.left.double().abs().sum(2, keepdim=True)
    rounding = 8 * weight.left.shape[2] * torch.finfo(bias.dtype).eps
    return bool(((bias.double() - summed).abs() <= rounding * size).all())


def _apart(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"joint_bias=True needs parameter {name!r} to be used at the same positions as its bias, found other uses of "
        "either, or a transposed convolution; take joint_bias=False there, by name"
    )
