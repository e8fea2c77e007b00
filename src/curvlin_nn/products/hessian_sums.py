"""What is kept of a Hessian: all of it, its blocks, or its diagonal; P products for each batch, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import BlockDiag, Dense, Diagonal
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import IndefiniteHessianError, UnsupportedError, one_of
from curvlin_nn.parameters import ParameterSpace, consecutive
from curvlin_nn.products.hessian import BatchHessian, Hessian

STRUCTURES = ("full", "block", "diag", "lowrank")
"""The structures a Hessian can have."""

INDEFINITE = ("raise", "clip", "abs")
"""What can be done with negative eigenvalues."""

MAX_PARAMETERS = 10_000
"""The parameters that a Hessian is multiplied out for, unless more are asked for."""

AT_ONCE = 64
"""Columns that are held at a time."""


def check_structure(structure: object, indefinite: str) -> tuple[str, str]:
    """Whether a Hessian can be given so: both, as they are.

    Raises:
        UnsupportedError: if it cannot.
    """
    if not isinstance(structure, str) or structure not in STRUCTURES:
        raise UnsupportedError(
            f"hessian_structure={structure!r} is not supported for kind='hessian', whose products have no factors; "
            f"expected {one_of(STRUCTURES)}, or hessian_eigenpairs, or matrix_free(kind='hessian'), or kind='ggn'"
        )
    return structure, check_indefinite(indefinite)


def check_indefinite(indefinite: str) -> str:
    """Whether there is such an answer to negative eigenvalues: the answer, as it is.

    Raises:
        UnsupportedError: if there is not.
    """
    if indefinite not in INDEFINITE:
        raise UnsupportedError(f"indefinite={indefinite!r} is not supported; expected {one_of(INDEFINITE)}")
    return indefinite


def check_size(space: ParameterSpace, max_parameters: int = MAX_PARAMETERS) -> None:
    """Whether a Hessian over these parameters is to be multiplied out.

    Raises:
        UnsupportedError: if there are more than `max_parameters`.
    """
    if space.size > max_parameters:
        raise UnsupportedError(
            f"max_parameters={max_parameters} is less than the {space.size} parameters whose Hessian takes as many "
            "products; raise it, choose fewer with subset_of_weights, or take matrix_free(kind='hessian')"
        )


@dataclass
class HessianSum:
    """The sum of the Hessians of batches, in a structure.

    Attributes:
        structure: one of `STRUCTURES` but for "lowrank", which is no sum.
        indefinite: one of `INDEFINITE`: raise; negative eigenvalues (of each block, entries of a diagonal) set to
            zero; or replaced by their absolute values.
        sizes: of the parameter tensors.
        blocks: the sums, float64: one matrix, or one for each parameter tensor, or the diagonal.
        resolution: the rounding unit that the products were made with.
    """

    structure: str
    indefinite: str
    sizes: tuple[int, ...]
    blocks: list[Tensor]
    resolution: float

    @classmethod
    def empty(cls, space: ParameterSpace, structure: str, indefinite: str) -> HessianSum:
        """The sum over no data."""
        return cls(structure, indefinite, tuple(shape.numel() for shape in space.shapes), [], 0.0)

    @classmethod
    def of(
        cls, H: Hessian, structure: str, indefinite: str, max_parameters: int = MAX_PARAMETERS
    ) -> HessianSum:
        """One pass over the data.

        Raises:
            UnsupportedError: for more than `max_parameters` parameters.
        """
        total: HessianSum | None = None
        for batch in H:
            if total is None:
                check_size(H.space, max_parameters)
                total = cls.empty(H.space, structure, indefinite)
            total.add(batch)
        assert total is not None  # a Hessian of no batch raises
        return total

    def add(self, batch: BatchHessian) -> None:
        """Add the Hessian of one batch, by as many products as there are parameters."""
        self.resolution = torch.finfo(batch.dtype).eps
        self._add(list(_blocks(batch, self.structure, self.sizes)))

    def check_merge(self, other: HessianSum) -> None:
        """Whether `merge` would add `other`: always."""

    def merge(self, other: HessianSum) -> None:
        """Add the sums over other data."""
        self._add(other.blocks)

    def finish(self) -> PrecisionOperator:
        """The Hessian, positive semidefinite: negative eigenvalues of the size of rounding are zero.

        Raises:
            IndefiniteHessianError: if it is not, and that is to raise.
        """
        if self.structure == "diag":
            return Diagonal(self._definite(self.blocks[0], "the diagonal of the Hessian"))
        if self.structure == "full":
            return Dense(self._definite_matrix(self.blocks[0], "the Hessian"))
        parts = [
            self._definite_matrix(block, f"block {b} of the Hessian") for b, block in enumerate(self.blocks)
        ]
        return BlockDiag([Dense(part) for part in parts], consecutive(self.sizes))

    def state_dict(self) -> dict[str, Any]:
        """The sums, as tensors and plain values."""
        return {"blocks": self.blocks, "resolution": self.resolution}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold the sums that another one held."""
        self.blocks, self.resolution = list(state["blocks"]), state["resolution"]

    def _add(self, blocks: list[Tensor]) -> None:
        self.blocks = [a + b for a, b in zip(self.blocks, blocks, strict=True)] if self.blocks else blocks

    def _definite_matrix(self, matrix: Float[Tensor, "D D"], where: str) -> Float[Tensor, "D D"]:
        matrix = (matrix + matrix.mT) / 2
        values, vectors = torch.linalg.eigh(matrix)
        definite = self._definite(values, where)
        if torch.equal(definite, values):
            return matrix
        rebuilt = (vectors * definite) @ vectors.mT
        return (rebuilt + rebuilt.mT) / 2

    def _definite(self, values: Float[Tensor, " D"], where: str) -> Float[Tensor, " D"]:
        if self.indefinite == "clip":
            return values.clamp(min=0.0)
        if self.indefinite == "abs":
            return values.abs()
        if bool(values.min() < -len(values) * self.resolution * values.abs().max()):
            raise IndefiniteHessianError(where, float(values.min()))
        return values.clamp(min=0.0)  # what is negative here is the rounding of the products


def _blocks(batch: BatchHessian, structure: str, sizes: tuple[int, ...]) -> Iterator[Float[Tensor, D * D]]:
    if structure == "full":
        yield torch.cat([columns for _, columns in batch.columns(0, sum(sizes), AT_ONCE)], dim=1).double()
        return
    if structure == "diag":
        parts = [
            columns[start : start + columns.shape[1]].diagonal()
            for start, columns in batch.columns(0, sum(sizes), AT_ONCE)
        ]
        yield torch.cat(parts).double()
        return
    begin = 0
    for size in sizes:
        span = slice(begin, begin + size)
        yield torch.cat(
            [columns[span] for _, columns in batch.columns(begin, span.stop, AT_ONCE)], dim=1
        ).double()
        begin = span.stop
