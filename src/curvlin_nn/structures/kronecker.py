"""KFAC: one Kronecker product per weight matrix, exact dense blocks for biases.

With S positions per sample (weight sharing) in the expand form (Eschenhagen et al., 2023):

    weights   (sum_nvs g g^T) (x) (sum_ns a a^T) / (N S)      exact without sharing for N = 1, and for a
                                                              linear network under squared error
    biases    sum_nv (sum_s g) (sum_s g)^T                    exact always

and in the reduce form, exact where positions enter the output by their mean and layers are linear,

    weights   (sum_nv (sum_s g) (sum_s g)^T) (x) (sum_n abar abar^T) / N,   abar = sum_s a / S

A weight used both as it is and transposed has a product for either kind of use, and the one product that is nearest
to their sum in the Frobenius norm.

Sums are in float64. So are products, unless float32 is asked for, which takes half the time: the operator then knows
how accurate it is and takes for zero what rounding may have made of it, which is all below some 1e-7 of a factor's
largest eigenvalue; where the data leave a factor without rank, a prior precision smaller than that is not seen.

Positions of ignored terms are left out of a's sums and of S where a sample has as many positions as terms.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlin import BlockDiag, Dense, KroneckerSum
from curvlin.precision.base import PrecisionOperator
from curvlin.projection import project
from curvlin_nn.capture import Block, Captures, Place, partition
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.gram_sum import GramSum
from curvlin_nn.structures.joint_bias import joint
from curvlin_nn.structures.registry import register

MAX_BLOCK = 2**14
"""Coordinates of the largest dense block that is made without being asked for: 2 GiB in float64."""


class _Factors:
    """Sums over data for one block: of ``g g^T``, of ``a a^T`` (None for a bias), and of positions."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.place = block.place
        natural = block.uses[0] if block.uses else block
        self.left = GramSum(natural.shape[0], dtype)
        self.right = None if block.right is None else GramSum(natural.shape[1], dtype)
        self.positions = 0
        self.turned = _Factors(block.uses[1], dtype) if block.uses else None
        self.same_left: _Factors | None = None

    def add(self, block: Block, captures: Captures, *, reduce: bool) -> None:
        """Add one batch; with columns that are not its first, inputs have counted already."""
        if block.uses:
            assert self.turned is not None  # as its place is that of the first batch
            block, turned = block.uses
            self.turned.add(turned, captures, reduce=reduce)
        if self.same_left is None:
            self.left.add(block.left.double().sum(2) if reduce else _by_sample(block.left))
        if self.right is not None and block.right is not None and captures.first:
            a = _inputs(block.right, captures.kept, reduce=reduce)
            self.positions += a.shape[:-1].numel()
            self.right.add(a)

    def merge(self, other: _Factors) -> None:
        """Add the sums over other data, which stay as they are."""
        if self.same_left is None:
            self.left.merge(other.left)
        if self.right is not None and other.right is not None:
            self.right.merge(other.right)
        if self.turned is not None and other.turned is not None:
            self.turned.merge(other.turned)
        self.positions += other.positions

    def share(self, other: _Factors) -> None:
        """Have the left sum of `other`: where a bias goes with a weight that is used once, they see the same g."""
        self.left, self.same_left = other.left, other

    def part(self) -> None:
        """Have a left sum of one's own, from here on."""
        if self.same_left is not None:
            self.left, self.same_left = self.left.copy(), None

    def product(self) -> tuple[Tensor, Tensor] | None:
        """The factors of outputs and inputs of the block; None where it is dense."""
        operator = self.operator()
        if not isinstance(operator, KroneckerSum):
            return None
        ((left, right),) = operator.terms
        assert left is not None and right is not None  # neither was left out as the identity
        return left, right

    def operator(self) -> PrecisionOperator:
        """The block, of sums that are as accurate as the products that they are of; float64."""
        return self._operator().to(self.left.dtype).to(torch.float64)

    def _operator(self) -> PrecisionOperator:
        if self.right is None:
            return Dense(self.left.value())
        own = (self.left.value(), self.right.value().div_(max(1, self.positions)))
        if self.turned is None or self.turned.right is None:
            return KroneckerSum([own])
        other = (self.turned.right.value() / max(1, self.turned.positions), self.turned.left.value())
        return project(KroneckerSum([own, other]), KroneckerSum, sizes=(len(own[0]), len(own[1]))).operator


def _by_sample(left: Float[Tensor, "N V S out"]) -> Float[Tensor, "*batch n out"]:
    """The same rows; without positions one axis less, so that they can stand in memory in any order."""
    return left.squeeze(2) if left.shape[2] == 1 else left


def _see_the_same(block: Block, other: Block) -> bool:
    """Whether two blocks have one tensor as their left factors, without positions."""
    kinds = [(b.left.data_ptr(), b.left.shape, b.left.stride()) for b in (block, other)]
    return kinds[0] == kinds[1] and block.left.shape[2] == 1 and not (block.uses or other.uses)


def _inputs(
    a: Float[Tensor, "N S in"], kept: Bool[Tensor, "N R"] | None, *, reduce: bool
) -> Float[Tensor, "*count in"]:
    """What counts as one input: each kept position, or the mean over the kept positions of a sample."""
    if kept is None or kept.shape != a.shape[:2]:
        return a.double().mean(1) if reduce else (a.squeeze(1) if a.shape[1] == 1 else a)
    if not reduce:
        return a[kept]
    some = kept.any(1)
    weights = kept[some].double()
    return (weights[:, None] @ a[some].double()).squeeze(1) / weights.sum(1, keepdim=True)


@register
class Kronecker(Structure):
    """KFAC with biases as separate exact blocks.

    Options are given by ``functools.partial(structures.Kronecker, approximation="reduce")``.

    Args:
        space: all parameters.
        approximation: ``"expand"`` or ``"reduce"``, how positions that share a weight are treated.
        max_block: the most coordinates of a parameter whose rows have no factors, which has an exact dense block.
        dtype: that of products of rows, float64 or float32.
        joint_bias: whether the weight and the bias of a module share a product, over ``[W b]``; see `joint`.

    Raises:
        UnsupportedError: for another approximation or dtype.
    """

    name = "kron"

    def __init__(
        self,
        space: ParameterSpace,
        *,
        approximation: str = "expand",
        max_block: int = MAX_BLOCK,
        joint_bias: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(space)
        if approximation not in ("expand", "reduce"):
            raise UnsupportedError(
                f"approximation={approximation!r} is not supported; expected {one_of(('expand', 'reduce'))}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(f"dtype must be torch.float32 or torch.float64, found {dtype}")
        self._reduce, self._max_block, self._joint_bias = approximation == "reduce", max_block, joint_bias
        self._dtype = dtype
        self._blocks: tuple[_Factors, ...] = ()

    def update(self, captures: Captures) -> None:
        """See `Structure.update`.

        Raises:
            UnsupportedError: if a parameter without factors has more than `max_block` coordinates.
        """
        blocks = self._of(captures)
        for block in blocks:
            if block.right is None and block.size > self._max_block:
                raise UnsupportedError(
                    f"parameter {block.parameter!r} has no Kronecker factors and {block.size} coordinates, expected "
                    f"at most max_block={self._max_block} for a dense block; raise max_block, or give it 'diag' by name"
                )
        self._at(blocks)
        for index, (factors, block) in enumerate(zip(self._blocks, blocks, strict=True)):
            weight = blocks[index - 1]
            if factors.same_left is not None and not _see_the_same(block, weight):
                factors.part()
        for factors, block in zip(self._blocks, blocks, strict=True):
            factors.add(block, captures, reduce=self._reduce)

    def _at(self, blocks: tuple[Block, ...]) -> None:
        """Have sums for these blocks."""
        if self._blocks:
            self._check_places([block.place for block in blocks])
            return
        self._blocks = tuple(_Factors(block, self._dtype) for block in blocks)
        for index in range(1, len(blocks)):
            if blocks[index].right is None and _see_the_same(blocks[index], blocks[index - 1]):
                self._blocks[index].share(self._blocks[index - 1])

    def _of(self, captures: Captures) -> tuple[Block, ...]:
        """One block for each product or dense block."""
        return joint(captures.blocks) if self._joint_bias else captures.blocks

    def check_merge(self, other: Kronecker) -> None:
        """See `Structure.check_merge`."""
        if self._blocks and other._blocks:
            self._check_places([f.place for f in other._blocks])

    def merge(self, other: Kronecker) -> None:
        """See `Structure.merge`."""
        self.check_merge(other)
        if not other._blocks:
            return
        if not self._blocks:
            self._blocks = copy.deepcopy(other._blocks)
            return
        pairs = list(zip(self._blocks, other._blocks, strict=True))
        for mine, theirs in pairs:
            if theirs.same_left is None:
                mine.part()
        for mine, theirs in pairs:
            mine.merge(theirs)

    def _check_places(self, places: list[Place]) -> None:
        if [f.place for f in self._blocks] != places:
            raise UnsupportedError(
                "a weight was used in parts of other shapes than in earlier data, expected the same in every batch"
            )

    def finish(self) -> BlockDiag:
        """See `Structure.finish`."""
        return BlockDiag(
            [factors.operator() for factors in self._blocks],
            partition([factors.place for factors in self._blocks]),
        )
