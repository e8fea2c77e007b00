"""Features cut as a precision is: a block may span several parameters, or hold one in another order."""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F

from curvlin import (
    BlockDiag,
    BlockFeatures,
    DenseFeatures,
    FeatureOperator,
    KhatriRaoFeatures,
    KroneckerSum,
    SpectralKronecker,
    Woodbury,
)
from curvlin.index import IndexSet
from curvlin.precision.base import PrecisionOperator


def aligned(Phi: FeatureOperator, P: PrecisionOperator) -> FeatureOperator:
    """The same features with the parts that stand in one block of P put together; nothing is multiplied out.

    They are left as they are where P has no blocks, or one that cuts through a part in factored form. Kronecker factors
    alone, as of a subnetwork within one weight, are one block.
    """
    if isinstance(Phi, BlockFeatures) and _matrix_sizes(P) is not None:
        (whole,) = cast(BlockFeatures, aligned(Phi, BlockDiag([P]))).parts
        return whole
    if not isinstance(P, BlockDiag) or not isinstance(Phi, BlockFeatures) or Phi.indices == P.indices:
        return Phi
    Phi = _cut(Phi, P.indices)
    members = _members(Phi.indices, P.indices)
    if members is None:
        return Phi
    parts: list[FeatureOperator] = []
    for (numbers, order), block in zip(members, P.blocks, strict=True):
        inside = [Phi.parts[number] for number in numbers]
        if order is None:
            parts.append(inside[0])
        else:
            parts.append(_joint(inside, order, block) or BlockFeatures(inside, order))
    return BlockFeatures(parts, P.indices)


def _cut(Phi: BlockFeatures, coarse: IndexSet) -> BlockFeatures:
    """The bias of a layer whose weight has several blocks stands in each of them with a part of its own."""
    cuts, indices = _cuts(Phi.indices, coarse)
    parts: list[FeatureOperator] = []
    for part, cut in zip(Phi.parts, cuts, strict=True):
        if len(cut) == 1:
            parts.append(part)
        elif isinstance(part, DenseFeatures):
            parts += [DenseFeatures(part.matrix[..., some.to(part.device)]) for some in cut]
        else:
            return Phi
    return BlockFeatures(parts, indices)


@functools.lru_cache(maxsize=64)
def _cuts(fine: IndexSet, coarse: IndexSet) -> tuple[tuple[tuple[torch.Tensor, ...], ...], IndexSet]:
    """For each fine block, which of its entries stand in one coarse block; and the blocks that are left."""
    owner, _ = _whereabouts(coarse)
    cuts = tuple(
        tuple((owner[coordinates] == number).nonzero().squeeze(1) for number in owner[coordinates].unique())
        for coordinates in fine.blocks
    )
    pieces = [coordinates[some] for coordinates, cut in zip(fine.blocks, cuts, strict=True) for some in cut]
    return cuts, fine if len(pieces) == len(cuts) else IndexSet(pieces)


@functools.lru_cache(maxsize=64)
def _members(fine: IndexSet, coarse: IndexSet) -> tuple[tuple[tuple[int, ...], IndexSet | None], ...] | None:
    """For each coarse block the fine ones in it, and where these stand in it: None if it is one, in the same order.

    None if a fine block lies in several coarse ones.
    """
    owner, position = _whereabouts(coarse)
    inside: list[list[int]] = [[] for _ in coarse.sizes]
    parts = fine.blocks
    for number, coordinates in enumerate(parts):
        first = int(owner[coordinates[0]])
        if bool((owner[coordinates] != first).any()):
            return None
        inside[first].append(number)
    found: list[tuple[tuple[int, ...], IndexSet | None]] = []
    for numbers in inside:
        order = IndexSet([position[parts[number]] for number in numbers])
        found.append((tuple(numbers), None if len(numbers) == 1 and order.consecutive else order))
    return tuple(found)


def _whereabouts(blocks: IndexSet) -> tuple[torch.Tensor, torch.Tensor]:
    """The block of each coordinate, and its position there."""
    owner, position = torch.empty(2, blocks.size, dtype=torch.long)
    for number, coordinates in enumerate(blocks.blocks):
        owner[coordinates], position[coordinates] = number, torch.arange(len(coordinates))
    return owner, position


def _joint(
    parts: list[FeatureOperator], order: IndexSet, block: PrecisionOperator
) -> KhatriRaoFeatures | None:
    """The features of a weight and of its bias as those of the matrix ``[W b]``, if that is what the block is over.

    The bias is one position more, with the last unit vector for its input; or a one behind the input of the only one.
    """
    sizes = _matrix_sizes(block)
    if sizes is None or len(parts) != 2:
        return None
    by_kind = sorted(
        zip(parts, order.blocks, strict=True), key=lambda part: isinstance(part[0], DenseFeatures)
    )
    (weight, places), (bias, _) = by_kind
    grid = torch.arange(block.size).view(sizes)[:, :-1].flatten()
    if not (isinstance(weight, KhatriRaoFeatures) and isinstance(bias, DenseFeatures)):
        return None
    if not torch.equal(places, grid):
        return None
    if weight.n_positions == 1 and torch.equal(weight.left.squeeze(-2), bias.matrix):
        return KhatriRaoFeatures(weight.left, F.pad(weight.right, (0, 1), value=1.0))
    right = F.pad(weight.right, (0, 1))
    unit = torch.zeros_like(right[..., :1, :])
    unit[..., -1] = 1
    left = torch.cat([weight.left, bias.matrix.unsqueeze(-2)], dim=-2)
    return KhatriRaoFeatures(left, torch.cat([right, unit], dim=-2))


def _matrix_sizes(block: PrecisionOperator) -> tuple[int, int] | None:
    """The numbers of rows and columns of the matrix that a block is over, if it is made of their factors."""
    if isinstance(block, (KroneckerSum, SpectralKronecker)):
        return block.sizes
    if isinstance(block, Woodbury) and isinstance(block.U, KhatriRaoFeatures):
        return block.U.out_features, block.U.in_features
    return None
