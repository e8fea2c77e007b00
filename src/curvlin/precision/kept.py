"""The factorisation that `P.factor()` keeps, and whether it is still that of the tensors of P."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlin.errors import StaleFactorError
from curvlin.numerics.implicit import factorize

if TYPE_CHECKING:
    from curvlin.precision.base import PrecisionOperator


@dataclass(frozen=True)
class Kept:
    """What an operator with kept factors has beside its tensors.

    Attributes:
        working: the operator in float64, that was factorised.
        live: whether derivatives could be asked for when it was made, in which case `working` is part of a graph.
        factors: of `working`.
        marks: the state of each tensor of the operator at that time.
    """

    working: Any
    live: bool
    factors: Any
    marks: tuple[int | Tensor, ...]

    @classmethod
    def of(cls, P: PrecisionOperator, holder: PrecisionOperator) -> Kept:
        """The factors of P, to be kept by `holder`: P itself, or P in another dtype."""
        working = P._working()
        marks = tuple(_mark(t) for t, _ in holder._tensors())
        return cls(working, P._needs_grad(), factorize(working), marks)

    def check(self, holder: PrecisionOperator) -> None:
        """Raise `StaleFactorError` if a tensor of the holder was changed in place."""
        pairs = zip(holder._tensors(), self.marks, strict=True)
        if not all(_unchanged(t, mark) for (t, _), mark in pairs):
            raise StaleFactorError(
                f"a tensor of this {type(holder).__name__} was changed in place after factor(); call factor() again"
            )


def _mark(tensor: Tensor) -> int | Tensor:
    """What `_unchanged` compares with: the count of edits in place, or a copy where torch does not count them."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, mark: int | Tensor) -> bool:
    return torch.equal(tensor, mark) if isinstance(mark, Tensor) else tensor._version == mark
