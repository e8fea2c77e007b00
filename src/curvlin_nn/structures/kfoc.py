"""KFOC: the Kronecker product that is nearest to the exact block of a weight in the Frobenius norm.

Alternating least squares from the factors of KFAC, two passes over the data for each iteration (Schnaus, Lee & Triebel,
2021; the power method for the leading singular triple of Van Loan & Pitsianis, 1993). With ``M_nv`` the gradient of the
weight of sample n and column v, as a matrix (out, in),

    B <- sum_nv M_nv A M_nv^T / |A|^2,    A <- sum_nv M_nv^T B M_nv / |B|^2

Each half is the best factor beside the other, so the error never grows; and positive semidefinite. Biases are exact
dense blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import KroneckerSum
from curvlin._check import positive_integer
from curvlin.numerics import tall
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Block, Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.kronecker import MAX_BLOCK, Kronecker
from curvlin_nn.structures.registry import register


@dataclass(frozen=True)
class _Half:
    """Half an iteration: one factor is held, at unit norm, and the other summed.

    Attributes:
        held: the factor that is held.
        root: R with ``R R^T`` the factor that is held.
        holds_right: whether that is the factor of the inputs.
        total: the sum over data.
    """

    held: Float[Tensor, "d d"]
    root: Float[Tensor, "d d"]
    holds_right: bool
    total: Float[Tensor, "e e"]

    @classmethod
    def of(cls, product: tuple[Tensor, Tensor], *, holds_right: bool) -> _Half:
        other, held = product if holds_right else product[::-1]
        norm = held.norm()
        held = held / torch.where(norm > 0, norm, 1.0)
        eigenvalues, vectors = torch.linalg.eigh(held)
        root = (vectors * eigenvalues.clamp(min=0).sqrt()).contiguous()  # as in files; see `EKFAC`
        return cls(held, root, holds_right, torch.zeros_like(other))

    @property
    def product(self) -> tuple[Tensor, Tensor]:
        """The factors of outputs and inputs."""
        return (self.total, self.held) if self.holds_right else (self.held, self.total)

    def plus(self, block: Block) -> _Half:
        """With the rows of one batch."""
        block = block.dense()
        assert block.right is not None
        left, right = block.left.double(), block.right.double()
        if self.holds_right:
            rows = _triangle(right @ self.root).unsqueeze(1) @ left
        else:
            rows = _triangle((left @ self.root).transpose(1, 2).flatten(2)) @ right
        return replace(self, total=self.total + tall.gram(rows.flatten(0, -2)))


def _triangle(C: Float[Tensor, "N S K"]) -> Float[Tensor, "N L S"]:
    """T with ``T^T T = C C^T``, of no more rows than C has of either kind."""
    if C.shape[1] == 1:
        return C.norm(dim=2, keepdim=True)
    T: Tensor = torch.linalg.qr(C.mT, mode="r").R
    return T


@register
class KFOC(Kronecker):
    """`Kronecker` with factors improved by alternating least squares.

    Args:
        space: all parameters.
        iterations: how many, of two passes over the data each.
        approximation: of the factors to start from; see `Kronecker`.
        max_block: see `Kronecker`.
        joint_bias: see `Kronecker`.
    """

    name = "kfoc"

    def __init__(
        self,
        space: ParameterSpace,
        *,
        iterations: int = 1,
        approximation: str = "expand",
        max_block: int = MAX_BLOCK,
        joint_bias: bool = False,
    ) -> None:
        super().__init__(space, approximation=approximation, max_block=max_block, joint_bias=joint_bias)
        self.passes = 1 + 2 * positive_integer("iterations", iterations)
        self._halves: tuple[_Half | None, ...] | None = None

    def begin(self, pass_index: int) -> None:
        """See `Structure.begin`."""
        if pass_index == 0:
            return
        if self._halves is None:
            products = [factors.product() for factors in self._blocks]
        else:
            products = [None if half is None else half.product for half in self._halves]
        self._halves = tuple(
            None if product is None else _Half.of(product, holds_right=pass_index % 2 == 1)
            for product in products
        )

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        if self._halves is None:
            super().update(captures)
            return
        blocks = self._of(captures)
        self._check_places(blocks)
        self._halves = tuple(
            None if half is None else half.plus(block)
            for half, block in zip(self._halves, blocks, strict=True)
        )

    def check_merge(self, other: Kronecker) -> None:
        """See `Structure.check_merge`.

        Raises:
            UnsupportedError: after the second pass has begun, when the sums hold factors of their own.
        """
        if self._halves is not None or (isinstance(other, KFOC) and other._halves is not None):
            raise UnsupportedError(
                "hessian_structure='kfoc' cannot merge sums beside different factors, expected states before their "
                "second pass; fit on all data at once, or use 'kron'"
            )
        super().check_merge(other)

    def _operators(self) -> list[PrecisionOperator]:
        assert self._halves is not None
        return [
            factors.operator() if half is None else KroneckerSum([half.product])
            for factors, half in zip(self._blocks, self._halves, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        halves = self._halves
        held = None if halves is None else [None if half is None else vars(half) for half in halves]
        return {**super().state_dict(), "halves": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        super().load_state_dict(state)
        held = state["halves"]
        self._halves = (
            None if held is None else tuple(None if half is None else _Half(**half) for half in held)
        )
