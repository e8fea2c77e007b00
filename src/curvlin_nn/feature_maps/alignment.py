"""Features cut as a precision is: a block may span several parameters, or hold one in another order."""

from __future__ import annotations

import functools

import torch

from curvlin import BlockDiag, BlockFeatures, FeatureOperator
from curvlin.index import IndexSet
from curvlin.precision.base import PrecisionOperator


def aligned(Phi: FeatureOperator, P: PrecisionOperator) -> FeatureOperator:
    """The same features with the parts that stand in one block of P put together; nothing is multiplied out.

    They are left as they are where P has no blocks, or one that cuts through a part.
    """
    if not isinstance(P, BlockDiag) or not isinstance(Phi, BlockFeatures) or Phi.indices == P.indices:
        return Phi
    members = _members(Phi.indices, P.indices)
    if members is None:
        return Phi
    parts: list[FeatureOperator] = []
    for numbers, order in members:
        inside = [Phi.parts[number] for number in numbers]
        parts.append(inside[0] if order is None else BlockFeatures(inside, order))
    return BlockFeatures(parts, P.indices)


@functools.lru_cache(maxsize=64)
def _members(fine: IndexSet, coarse: IndexSet) -> tuple[tuple[tuple[int, ...], IndexSet | None], ...] | None:
    """For each coarse block the fine ones in it, and where these stand in it: None if it is one, in the same order.

    None if a fine block lies in several coarse ones.
    """
    owner, position = torch.empty(2, coarse.size, dtype=torch.long)
    for number, coordinates in enumerate(coarse.blocks):
        owner[coordinates], position[coordinates] = number, torch.arange(len(coordinates))
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
