"""A batch's factored per-sample Jacobian, one block for each part of each chosen parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlin.index import IndexSet
from curvlin_nn.capture.one_hot import OneHot
from curvlin_nn.capture.patches import Patches
from curvlin_nn.errors import UnsupportedUseError

if TYPE_CHECKING:
    from curvlin_nn.output_curvature import OutputCurvature


@dataclass(frozen=True)
class Block:
    """A contiguous part of one parameter's per-sample Jacobian: rows ``sum_s left_s (x) right_s``.

    Attributes:
        parameter: the name of the parameter.
        start: where the part begins in the flat vector of the parameter space.
        left: ``(N, V, S, out)``.
        right: ``(N, S, in)``; None stands for the number one, with S already summed (``S = in = 1``).
        transposed: whether the part stands in the flat vector as (in, out), instead of as (out, in).
        uses: where a parameter is used both as it is and transposed (an embedding tied to the output layer), the rows
            of either kind of use; empty otherwise. The block itself holds the sum of their rows.
        compact: ``(N, S)`` vectors; stands in the place of right where that is unit vectors or patches of images, in
            `Captures.parts` only.
    """

    parameter: str
    start: int
    left: Float[Tensor, "N V S out"]
    right: Float[Tensor, "N S in"] | None
    transposed: bool = False
    uses: tuple[Block, ...] = ()
    compact: OneHot | Patches | None = None

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        if self.compact is not None:
            return self.left.shape[-1], self.compact.size
        return self.left.shape[-1], 1 if self.right is None else self.right.shape[-1]

    @property
    def span(self) -> range:
        """The coordinates, as a set."""
        return range(self.start, self.start + self.size)

    @property
    def place(self) -> Place:
        """Where the block stands in the flat vector."""
        return Place(self.start, *self.shape, self.transposed and min(self.shape) > 1)

    def of_samples(self, samples: slice | Int[Tensor, " n"]) -> Block:
        """The rows of some samples."""
        right = None if self.right is None else self.right[samples]
        compact = None if self.compact is None else self.compact.of_samples(samples)
        uses = tuple(use.of_samples(samples) for use in self.uses)
        return replace(self, left=self.left[samples], right=right, uses=uses, compact=compact)

    def dense(self) -> Block:
        """The same rows with unit vectors and patches written out."""
        if self.compact is None:
            return self
        return replace(self, right=self.compact.dense(self.left), compact=None)

    def without_patches(self) -> Block:
        """The same rows with patches written out; unit vectors stay as they are."""
        return self.dense() if isinstance(self.compact, Patches) else self

    def moved(self, by: int) -> Block:
        """The same part of a parameter that begins elsewhere in the flat vector."""
        return replace(self, start=self.start + by, uses=tuple(use.moved(by) for use in self.uses))

    def rows(self) -> Float[Tensor, "N V size"]:
        """The rows multiplied out, in the order (out, in)."""
        if self.compact is not None:
            return self.dense().rows()
        if self.right is None:
            return self.left.squeeze(2)
        if self.left.shape[2] == 1:
            return torch.einsum("nvo,ni->nvoi", self.left.squeeze(2), self.right.squeeze(1)).flatten(2)
        return (self.left.mT @ self.right[:, None]).flatten(2)

    def flat_rows(self) -> Float[Tensor, "N V size"]:
        """The rows multiplied out, in the order of the flat vector."""
        rows = self.rows()
        return rows.unflatten(2, self.shape).mT.flatten(2) if self.place.transposed else rows


@dataclass(frozen=True)
class JointBlock(Block):
    """The rows of ``[W b]``, the weight of a layer with its bias as one column more: right ends in a one.

    Attributes:
        bias: where the bias begins in the flat vector of the parameter space.
    """

    bias: int = 0

    @property
    def place(self) -> Place:
        """Where the block stands in the flat vector."""
        return replace(super().place, bias=self.bias)

    def moved(self, by: int) -> JointBlock:
        """See `Block.moved`."""
        return replace(self, start=self.start + by, bias=self.bias + by)


@dataclass(frozen=True)
class Place:
    """The coordinates of a matrix (out, in) in the flat vector.

    Attributes:
        start: the first coordinate.
        out: rows.
        inputs: columns.
        transposed: whether the flat vector holds the transpose.
        bias: where the last column begins if it stands apart from the others, as in ``[W b]``; None if it does not.
    """

    start: int
    out: int
    inputs: int
    transposed: bool = False
    bias: int | None = None

    @property
    def consecutive(self) -> bool:
        """Whether the coordinates in the order (out, in) are consecutive numbers."""
        return not self.transposed and self.bias is None

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.out * self.inputs

    @property
    def coordinates(self) -> Int[Tensor, " size"]:
        """The coordinate of each entry, in the order (out, in)."""
        inputs = self.inputs if self.bias is None else self.inputs - 1
        span = torch.arange(self.start, self.start + self.out * inputs)
        matrix = span.view(inputs, self.out).mT if self.transposed else span.view(self.out, inputs)
        if self.bias is not None:
            bias = torch.arange(self.bias, self.bias + self.out)
            matrix = torch.cat([matrix, bias[:, None]], dim=1)
        return matrix.flatten()


def partition(places: Sequence[Place]) -> IndexSet:
    """The coordinates of blocks side by side, for a `BlockDiag` or for `BlockFeatures`.

    One object for equal places, so that telling two partitions equal is free.
    """
    return _partition(tuple(places))


@functools.lru_cache(maxsize=64)
def _partition(places: tuple[Place, ...]) -> IndexSet:
    if all(place.consecutive for place in places):
        return IndexSet.of_sizes([place.size for place in places])
    return IndexSet([place.coordinates for place in places])


@dataclass(frozen=True)
class Captures:
    """What one batch says about the chosen parameters, for given columns.

    Attributes:
        n_samples: N, the samples of the batch.
        parts: the parts of all chosen parameters in flat order, without gaps, as they were captured: the inputs of
            embeddings and convolutions are not written out.
        first: whether these are the first columns of the batch; what depends on inputs alone counts only then.
        kept: which terms of the log-likelihood count (those not ignored), or None where all do.
        output_curvature: what stands in the place of columns, of which the blocks then have none: those of a linear
            layer whose outputs are the terms of the log-likelihood have its columns for left factors. Only structures
            that take it see it.
    """

    n_samples: int
    parts: tuple[Block, ...]
    first: bool = True
    kept: Bool[Tensor, "N R"] | None = None
    output_curvature: OutputCurvature | None = None

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The same parts with every input as a vector."""
        return tuple(part.dense() for part in self.parts)

    @property
    def partition(self) -> IndexSet:
        """Where the blocks stand."""
        return partition([part.place for part in self.parts])


def merged(parameter: str, start: int, uses: Iterable[Block]) -> Block:
    """All uses of one part of a parameter: their Jacobians add, so their positions stand side by side.

    Raises:
        UnsupportedUseError: if they cut the parameter into parts of different shapes.
    """
    uses = list(uses)
    if len(uses) == 1:
        return uses[0]
    uses = [use.without_patches() for use in uses]
    if len({(use.compact is None, use.transposed) for use in uses}) > 1:
        uses = [use.dense() for use in uses]
    kinds = [[use for use in uses if use.transposed == transposed] for transposed in (False, True)]
    oriented = [_side_by_side(parameter, kind) for kind in kinds if kind]
    if len(oriented) == 1:
        return oriented[0]
    natural, transposed = oriented
    if natural.shape != transposed.shape[::-1]:
        raise UnsupportedUseError(parameter, "is used in parts of different shapes")
    return replace(_side_by_side(parameter, [natural, _turned(transposed)]), uses=(natural, transposed))


def joined(parameter: str, by_sample: Sequence[Sequence[Block]]) -> list[Block]:
    """The blocks of one parameter of several samples, given each sample's alone.

    Samples may differ in their number of positions. Where they cut the parameter into different blocks, its rows are
    multiplied out.
    """
    by_sample = [[block.without_patches() for block in blocks] for blocks in by_sample]
    if any(
        [_form(block) for block in blocks] != [_form(block) for block in by_sample[0]] for blocks in by_sample
    ):
        rows = torch.stack(
            [torch.cat([block.flat_rows()[0] for block in blocks], dim=1) for blocks in by_sample]
        )
        return [Block(parameter, by_sample[0][0].start, rows[:, :, None], None)]
    return [stacked(blocks) for blocks in zip(*by_sample, strict=True)]


def _form(block: Block) -> tuple[Place, bool, bool, bool, int]:
    return (block.place, block.right is None, block.compact is None, block.transposed, len(block.uses))


def stacked(blocks: Sequence[Block]) -> Block:
    """One block of several samples', with positions of zeros where others have more."""
    longest = max(block.left.shape[2] for block in blocks)

    def of(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, longest - tensor.shape[-2]))

    left = torch.cat([of(block.left) for block in blocks])
    rights = [of(block.right) for block in blocks if block.right is not None]
    inputs = [block.compact.padded(longest).index for block in blocks if isinstance(block.compact, OneHot)]
    uses = tuple(stacked(uses) for uses in zip(*(block.uses for block in blocks), strict=True))
    return replace(
        blocks[0],
        left=left,
        right=torch.cat(rights) if rights else None,
        compact=OneHot(torch.cat(inputs), blocks[0].shape[1]) if inputs else None,
        uses=uses,
    )


def _side_by_side(parameter: str, uses: list[Block]) -> Block:
    if len({(use.shape, use.right is None) for use in uses}) > 1:
        raise UnsupportedUseError(parameter, "is used in parts of different shapes")
    if len(uses) == 1:
        return uses[0]
    left = torch.cat([use.left for use in uses], dim=2)
    inputs = [use.compact.index for use in uses if isinstance(use.compact, OneHot)]
    if inputs:
        return replace(uses[0], left=left, compact=OneHot(torch.cat(inputs, dim=1), uses[0].shape[1]))
    if uses[0].right is None:
        return replace(uses[0], left=torch.stack([use.left for use in uses]).sum(0))
    rights = [use.right for use in uses if use.right is not None]
    return replace(uses[0], left=left, right=torch.cat(rights, dim=1))


def _turned(block: Block) -> Block:
    """The same rows of a transposed block as of one that is not: a position for each column of the matrix."""
    out, inputs = block.shape
    rows = block.rows().unflatten(-1, (out, inputs))
    identity = torch.eye(out, dtype=rows.dtype, device=rows.device).expand(len(rows), out, out)
    return Block(block.parameter, block.start, rows, identity)
