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
        marks: the state at that time of each tensor of the operator and of `working`, which shares those of the
            original where the operator has another dtype.
    """

    working: Any
    live: bool
    factors: Any
    marks: tuple[int | Tensor, ...]

    @classmethod
    def of(cls, P: PrecisionOperator, holder: PrecisionOperator) -> Kept:
        """The factors of P, to be kept by `holder`: P itself, or P in another dtype."""
        working = P._working()
        marks = tuple(map(_mark, _distinct(holder, working)))
        return cls(working, P._needs_grad(), factorize(working), marks)

    def check(self, holder: PrecisionOperator) -> None:
        """Raise `StaleFactorError` if a tensor of the holder, or one that was factorised, was changed in place."""
        if not all(map(_unchanged, _distinct(holder, self.working), self.marks)):
            raise StaleFactorError(
                f"a tensor of this {type(holder).__name__} was changed in place after factor(); call factor() again"
            )


def _distinct(holder: PrecisionOperator, working: PrecisionOperator) -> list[Tensor]:
    """The tensors of both, each once."""
    tensors = [t for P in (holder, working) for t, _ in P._tensors()]
    return list({id(t): t for t in tensors}.values())


def _mark(tensor: Tensor) -> int | Tensor:
    """What `_unchanged` compares with: the count of edits in place, or a copy where torch does not count them."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, mark: int | Tensor) -> bool:
    return torch.equal(tensor, mark) if isinstance(mark, Tensor) else tensor._version == mark
