"""KFAC: one Kronecker product per weight matrix, exact dense blocks for biases.

With S positions per sample (weight sharing) in the expand form (Eschenhagen et al., 2023):

    weights   (sum_nvs g g^T) (x) (sum_ns a a^T) / (N S)      exact without sharing for N = 1, and for a
                                                              linear network under squared error
    biases    sum_nv (sum_s g) (sum_s g)^T                    exact always
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from curvlin import BlockDiag, Dense, KroneckerSum
from curvlin.numerics import tall
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Block, Captures, Place, partition
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register


@dataclass(frozen=True)
class _Factors:
    """Sums over data for one block: of ``g g^T``, of ``a a^T`` (None for a bias), and of positions.

    In float64, so that rounding leaves nothing to speak of where they have no rank.
    """

    place: Place
    left: Float[Tensor, "out out"]
    right: Float[Tensor, "in in"] | None
    positions: int

    @classmethod
    def of(cls, block: Block, *, first: bool) -> _Factors:
        """The sums of one batch; with columns that are not its first, inputs have counted already."""
        left = tall.gram(block.left.flatten(0, 2))
        if block.right is None:
            return cls(block.place, left, None, 0)
        a = block.right.flatten(0, 1) if first else block.right.new_zeros(0, block.right.shape[-1])
        return cls(block.place, left, tall.gram(a), len(a))

    def __add__(self, other: _Factors) -> _Factors:
        right = None if self.right is None or other.right is None else self.right + other.right
        return _Factors(self.place, self.left + other.left, right, self.positions + other.positions)

    def operator(self) -> PrecisionOperator:
        if self.right is None:
            return Dense(self.left)
        return KroneckerSum([(self.left, self.right / self.positions)])


@register
class Kronecker(Structure):
    """KFAC, expand form, with biases as separate exact blocks."""

    name = "kron"

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self._blocks: tuple[_Factors, ...] = ()

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        self._add(tuple(_Factors.of(block, first=captures.first) for block in captures.blocks))

    def merge(self, other: Kronecker) -> None:
        """See `Structure.merge`."""
        if other._blocks:
            self._add(other._blocks)

    def _add(self, blocks: tuple[_Factors, ...]) -> None:
        if self._blocks:
            if [f.place for f in self._blocks] != [f.place for f in blocks]:
                raise UnsupportedError(
                    "a weight was used in parts of other shapes than in earlier data, expected the same in "
                    "every batch"
                )
            blocks = tuple(mine + theirs for mine, theirs in zip(self._blocks, blocks, strict=True))
        self._blocks = blocks

    def finish(self) -> BlockDiag:
        """See `Structure.finish`."""
        return BlockDiag(
            [factors.operator() for factors in self._blocks],
            partition([factors.place for factors in self._blocks]),
        )
