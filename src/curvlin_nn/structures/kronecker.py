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
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlin import BlockDiag, Dense, KroneckerSum
from curvlin.precision.base import PrecisionOperator
from curvlin.projection import project
from curvlin_nn.capture import Block, Captures, OneHot, Patches, Place, partition
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

    def __init__(
        self,
        parameter: str,
        place: Place,
        left: GramSum,
        right: GramSum | None,
        positions: int = 0,
        turned: _Factors | None = None,
    ) -> None:
        self.parameter, self.place = parameter, place
        self.left, self.right, self.positions, self.turned = left, right, positions, turned
        self.same_left: _Factors | None = None

    @classmethod
    def for_block(cls, block: Block, dtype: torch.dtype) -> _Factors:
        """Sums of nothing, of the sizes of a block."""
        natural = block.uses[0] if block.uses else block
        right = None if _is_dense(block) else GramSum(natural.shape[1], dtype)
        turned = cls.for_block(block.uses[1], dtype) if block.uses else None
        return cls(block.parameter, block.place, GramSum(natural.shape[0], dtype), right, turned=turned)

    @classmethod
    def of(cls, state: dict[str, Any], before: _Factors | None, dtype: torch.dtype) -> _Factors:
        """The sums that had this `state_dict`, of the block that stands after those of `before`."""
        left, right, turned = state["left"], state["right"], state["turned"]
        factors = cls(
            state["parameter"],
            Place(**state["place"]),
            GramSum(state["place"]["out"], dtype) if left is None else GramSum.of(left, dtype),
            None if right is None else GramSum.of(right, dtype),
            state["positions"],
            None if turned is None else cls.of(turned, None, dtype),
        )
        if left is None and before is not None:
            factors.share(before)
        return factors

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values; a left sum that is that of the block before is left out."""
        return {
            "parameter": self.parameter,
            "place": asdict(self.place),
            "left": None if self.same_left is not None else self.left.state_dict(),
            "right": None if self.right is None else self.right.state_dict(),
            "positions": self.positions,
            "turned": None if self.turned is None else self.turned.state_dict(),
        }

    def add(self, block: Block, captures: Captures, *, reduce: bool) -> None:
        """Add one batch; with columns that are not its first, inputs have counted already."""
        if block.uses:
            assert self.turned is not None  # as its place is that of the first batch
            block, turned = block.uses
            self.turned.add(turned, captures, reduce=reduce)
        if self.same_left is None:
            self.left.add(block.left.double().sum(2) if reduce else _by_sample(block.left))
        if self.right is not None and captures.first:
            self.positions += _add_inputs(self.right, block, captures.kept, reduce=reduce)

    def add_left(self, product: Float[Tensor, "out out"]) -> None:
        """Add ``sum g g^T`` as such."""
        if self.same_left is None:
            self.left.add_product(product)

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
        left = self.left.value()
        own = (left, self.right.value().to(left.device).div_(max(1, self.positions)))
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


def _is_dense(block: Block) -> bool:
    """Whether a block's rows have no factors."""
    return block.right is None and block.compact is None


def _add_inputs(total: GramSum, block: Block, kept: Bool[Tensor, "N R"] | None, *, reduce: bool) -> int:
    """Add the inputs of one batch, and say how many they were."""
    if isinstance(block.compact, OneHot):
        index = block.compact.index
        tokens = index[kept] if kept is not None and kept.shape == index.shape else index
        total.add_units(OneHot(tokens, block.compact.size))
        return tokens.numel()
    if isinstance(block.compact, Patches):
        if block.compact.shares_products and (kept is None or kept.shape != block.left.shape[:3:2]):
            total.add_product(block.compact.gram(total.dtype))
            return block.compact.count
        block = block.dense()
    assert block.right is not None
    a = _inputs(block.right, kept, reduce=reduce)
    total.add(a)
    return a.shape[:-1].numel()


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
        max_block: the most coordinates of a parameter whose rows have no factors, which has an exact dense block; and
            the most tokens of an embedding, whose factor is as long on either side.
        dtype: that of products of rows, float64 or float32.
        joint_bias: whether the weight and the bias of a module share a product, over ``[W b]``; see `joint`.

    Raises:
        UnsupportedError: for another approximation or dtype.
    """

    name = "kron"
    takes_output_curvature = True

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
            UnsupportedError: if a parameter without factors has more than `max_block` coordinates, or an embedding as
                many tokens.
        """
        for part in captures.parts:
            if isinstance(part.compact, OneHot) and part.compact.size > self._max_block:
                raise UnsupportedError(
                    f"parameter {part.parameter!r} has a Kronecker factor of {part.compact.size} tokens, "
                    f"expected at most max_block={self._max_block}; raise max_block, or give it 'diag' by name"
                )
        blocks = self._of(captures)
        for block in blocks:
            if _is_dense(block) and block.size > self._max_block:
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
        if captures.output_curvature is not None:
            total = captures.output_curvature.total()
            for factors in self._blocks:
                factors.add_left(total)

    def _at(self, blocks: tuple[Block, ...]) -> None:
        """Have sums for these blocks."""
        if self._blocks:
            self._check_places(blocks)
            return
        self._blocks = tuple(_Factors.for_block(block, self._dtype) for block in blocks)
        for index in range(1, len(blocks)):
            if _is_dense(blocks[index]) and _see_the_same(blocks[index], blocks[index - 1]):
                self._blocks[index].share(self._blocks[index - 1])

    def _of(self, captures: Captures) -> tuple[Block, ...]:
        """One block for each product or dense block; only where each position is an input do tokens stay indices."""
        blocks = captures.blocks if self._reduce else captures.parts
        return joint(blocks) if self._joint_bias else blocks

    def check_merge(self, other: Kronecker) -> None:
        """See `Structure.check_merge`."""
        if self._blocks and other._blocks:
            self._check_places(other._blocks)

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

    def _check_places(self, others: Sequence[Block | _Factors]) -> None:
        mine, theirs = ({(part.parameter, part.place) for part in parts} for parts in (self._blocks, others))
        if mine != theirs:
            name = min(mine ^ theirs, key=lambda part: part[1].start)[0]
            raise UnsupportedError(
                f"parameter {name!r} has rows of another form than in earlier data (parts of other shapes, or "
                "served by autodiff since this batch), expected the same in every batch; "
                "give it 'block' or 'diag' by name"
            )

    def finish(self) -> BlockDiag:
        """See `Structure.finish`."""
        return BlockDiag(self._operators(), partition([factors.place for factors in self._blocks]))

    def _operators(self) -> list[PrecisionOperator]:
        """The curvature of each block."""
        return [factors.operator() for factors in self._blocks]

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"blocks": [factors.state_dict() for factors in self._blocks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        blocks: list[_Factors] = []
        for of_block in state["blocks"]:
            blocks.append(_Factors.of(of_block, blocks[-1] if blocks else None, self._dtype))
        self._blocks = tuple(blocks)
