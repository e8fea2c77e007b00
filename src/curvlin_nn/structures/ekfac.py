"""EKFAC: the eigenbasis of KFAC with the second moments of the rows in it (George et al., 2018).

The first pass sums the Kronecker factors, the second the squares of the rows in their eigenbasis. A rotation
keeps the trace, so EKFAC has that of the exact block; and the diagonal in a basis is the nearest one in the
Frobenius norm, so no KFAC with that basis is nearer. Biases are exact dense blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlin import SpectralKronecker
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Block, Captures, OneHot
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.structures.diagonal import squares
from curvlin_nn.structures.kronecker import Kronecker
from curvlin_nn.structures.registry import register

_Bases = tuple[Tensor, Tensor]


@register
class EKFAC(Kronecker):
    """``(QB (x) QA) diag(sum_nv (row_nv (QB (x) QA))^2) (QB (x) QA)^T`` for each weight; see `Kronecker`."""

    name = "ekfac"
    passes = 2
    _bases: tuple[_Bases | None, ...] | None = None
    _squares: tuple[Tensor | None, ...] = ()

    def begin(self, pass_index: int) -> None:
        """See `Structure.begin`."""
        if pass_index == 1:
            self._bases = tuple(_eigenbases(factors.product()) for factors in self._blocks)
            self._squares = tuple(
                None if bases is None else bases[0].new_zeros(bases[0].shape[0] * bases[1].shape[0])
                for bases in self._bases
            )

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        if self._bases is None:
            super().update(captures)
            return
        blocks = self._of(captures)
        self._check_places(blocks)
        self._squares = tuple(
            None if bases is None or total is None else total + squares(_rotated(block, bases))
            for total, block, bases in zip(self._squares, blocks, self._bases, strict=True)
        )

    def check_merge(self, other: Kronecker) -> None:
        """See `Structure.check_merge`.

        Raises:
            UnsupportedError: after the second pass has begun, when the sums are in bases of their own.
        """
        if self._bases is not None or (isinstance(other, EKFAC) and other._bases is not None):
            raise UnsupportedError(
                "hessian_structure='ekfac' cannot merge eigenvalues in different bases, expected states before "
                "their second pass; fit on all data at once, or use 'kron'"
            )
        super().check_merge(other)

    def _operators(self) -> list[PrecisionOperator]:
        assert self._bases is not None
        return [
            factors.operator()
            if bases is None or total is None
            else SpectralKronecker(*bases, total.unflatten(0, (factors.place.out, factors.place.inputs)))
            for factors, bases, total in zip(self._blocks, self._bases, self._squares, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {**super().state_dict(), "bases": self._bases, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        super().load_state_dict(state)
        bases, squares = state["bases"], state["squares"]
        self._bases = (
            None if bases is None else tuple(None if pair is None else tuple(pair) for pair in bases)
        )
        self._squares = tuple(squares)


def _eigenbases(product: tuple[Tensor, Tensor] | None) -> _Bases | None:
    if product is None:
        return None
    left, right = product
    QB, QA = (torch.linalg.eigh(factor).eigenvectors.contiguous() for factor in (left, right))
    return QB, QA  # contiguous, as they are in files: products of other layouts round otherwise


def _rotated(block: Block, bases: _Bases) -> Block:
    """The rows in an eigenbasis: ``sum_s (QB^T left_s) (x) (QA^T right_s)``, float64."""
    QB, QA = bases
    if isinstance(block.compact, OneHot):
        right = block.compact.times(QA)
    else:
        block = block.without_patches()
        assert block.right is not None
        right = block.right.double() @ QA
    return replace(block, left=block.left.double() @ QB, right=right, compact=None, uses=())
