"""KFAC: one Kronecker product per weight matrix, exact dense blocks for biases.

With S positions per sample (weight sharing) in the expand form (Eschenhagen et al., 2023):

    weights   (sum_nvs g g^T) (x) (sum_ns a a^T) / (N S)      exact without sharing for N = 1, and for a
                                                              linear network under squared error
    biases    sum_nv (sum_s g) (sum_s g)^T                    exact always

and in the reduce form, exact where positions enter the output by their mean and layers are linear,

    weights   (sum_nv (sum_s g) (sum_s g)^T) (x) (sum_n abar abar^T) / N,   abar = sum_s a / S

A weight used both as it is and transposed has a product for either kind of use, and the one product that is nearest
to their sum in the Frobenius norm.

Positions of ignored terms are left out of a's sums and of S where a sample has as many positions as terms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from curvlin import BlockDiag, Dense, KroneckerSum
from curvlin.numerics import tall
from curvlin.precision.base import PrecisionOperator
from curvlin.projection import project
from curvlin_nn.capture import Block, Captures, Place, partition
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.joint_bias import joint
from curvlin_nn.structures.registry import register

MAX_BLOCK = 2**14
"""Coordinates of the largest dense block that is made without being asked for: 2 GiB in float64."""


@dataclass(frozen=True)
class _Factors:
    """Sums over data for one block: of ``g g^T``, of ``a a^T`` (None for a bias), and of positions.

    In float64, so that rounding leaves nothing to speak of where they have no rank.
    """

    place: Place
    left: Float[Tensor, "out out"]
    right: Float[Tensor, "in in"] | None
    positions: int
    turned: _Factors | None = None

    @classmethod
    def of(cls, block: Block, captures: Captures, *, reduce: bool) -> _Factors:
        """The sums of one batch; with columns that are not its first, inputs have counted already."""
        if block.uses:
            natural, turned = (cls.of(use, captures, reduce=reduce) for use in block.uses)
            return replace(natural, place=block.place, turned=turned)
        g = block.left.double().sum(2) if reduce else block.left.flatten(1, 2)
        left = tall.gram(g.flatten(0, 1))
        if block.right is None:
            return cls(block.place, left, None, 0)
        a = _inputs(block.right, captures.kept, reduce=reduce) if captures.first else block.right[:0, 0]
        if len(a) == 0:  # columns that are not the first, or a batch of ignored terms only
            return cls(block.place, left, left.new_zeros(a.shape[-1], a.shape[-1]), 0)
        return cls(block.place, left, tall.gram(a), len(a))

    def __add__(self, other: _Factors) -> _Factors:
        right = None if self.right is None or other.right is None else self.right + other.right
        turned = None if self.turned is None or other.turned is None else self.turned + other.turned
        return _Factors(self.place, self.left + other.left, right, self.positions + other.positions, turned)

    def operator(self) -> PrecisionOperator:
        if self.right is None:
            return Dense(self.left)
        own = (self.left, self.right / max(1, self.positions))
        if self.turned is None or self.turned.right is None:
            return KroneckerSum([own])
        other = (self.turned.right / max(1, self.turned.positions), self.turned.left)
        return project(KroneckerSum([own, other]), KroneckerSum, sizes=(len(own[0]), len(own[1]))).operator


def _inputs(
    a: Float[Tensor, "N S in"], kept: Bool[Tensor, "N R"] | None, *, reduce: bool
) -> Float[Tensor, "count in"]:
    """What counts as one input: each kept position, or the mean over the kept positions of a sample."""
    if kept is None or kept.shape != a.shape[:2]:
        return a.double().mean(1) if reduce else a.flatten(0, 1)
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
        joint_bias: whether the weight and the bias of a module share a product, over ``[W b]``; see `joint`.

    Raises:
        UnsupportedError: for another approximation.
    """

    name = "kron"

    def __init__(
        self,
        space: ParameterSpace,
        *,
        approximation: str = "expand",
        max_block: int = MAX_BLOCK,
        joint_bias: bool = False,
    ) -> None:
        super().__init__(space)
        if approximation not in ("expand", "reduce"):
            raise UnsupportedError(
                f"approximation={approximation!r} is not supported; expected {one_of(('expand', 'reduce'))}"
            )
        self._reduce, self._max_block, self._joint_bias = approximation == "reduce", max_block, joint_bias
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
        self._add(tuple(_Factors.of(block, captures, reduce=self._reduce) for block in blocks))

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
        if other._blocks:
            self._add(other._blocks)

    def _add(self, blocks: tuple[_Factors, ...]) -> None:
        if self._blocks:
            self._check_places([f.place for f in blocks])
            blocks = tuple(mine + theirs for mine, theirs in zip(self._blocks, blocks, strict=True))
        self._blocks = blocks

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
