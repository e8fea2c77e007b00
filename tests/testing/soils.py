"""Sound operators of five structures to plant bugs in, each with a definition that shares nothing with it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal
from curvlin.precision.kronecker import KroneckerSum
from curvlin.precision.low_rank import LowRankPlusDiag, Woodbury


def spectrum(n: int, log10cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.logspace(0, -log10cond, n, dtype=torch.float64)
    return values[torch.rand(*batch, n, generator=generator).argsort(-1)]


def spd(n: int, log10cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
    Q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64, generator=generator)).Q
    M = (Q * spectrum(n, log10cond, batch, generator).unsqueeze(-2)) @ Q.mT
    return (M + M.mT) / 2


def divisors(size: int) -> tuple[int, int]:
    a = max(d for d in range(1, size + 1) if size % d == 0 and d * d <= size)
    return a, size // a


@dataclasses.dataclass(frozen=True)
class Soil:
    """A sound class, how one of it is made, and the matrix that it is."""

    sound: type[PrecisionOperator]
    make: Callable[..., PrecisionOperator]
    dense: Callable[[Any], Tensor]

    def plant(self, *bugs: type) -> Callable[..., PrecisionOperator]:
        """A maker of operators with these bugs."""
        cls = _planted(self.sound, *bugs)

        def make(size: int, log10cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Any:
            return self.make(cls, size, log10cond, batch, generator)

        return make


@functools.cache
def _planted(sound: type, *bugs: type) -> type:
    if not bugs:
        return sound
    name = "".join(bug.__name__ for bug in bugs) + sound.__name__
    cls = type(
        name, (*bugs, sound), {"__module__": __name__, "__eq__": object.__eq__, "__hash__": object.__hash__}
    )
    globals()[name] = cls  # where pickle looks for it
    return cls


def make_diagonal(cls: Any, n: int, cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Any:
    return cls(spectrum(n, cond, batch, generator))


def make_kronecker(cls: Any, n: int, cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Any:
    a, b = divisors(n)
    delta = torch.full(batch, 10.0**-cond, dtype=torch.float64)
    return cls.shifted(spd(a, cond / 2, batch, generator), spd(b, cond / 2, batch, generator), delta)


def kronecker_matrix(P: KroneckerSum) -> Tensor:
    ((left, right),) = P.terms
    assert left is not None and right is not None and P.shift is not None
    return torch.kron(left, right) + P.shift * torch.eye(P.size, dtype=left.dtype)


def make_low_rank(cls: Any, n: int, cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Any:
    U = torch.randn(*batch, n, min(n, 2), dtype=torch.float64, generator=generator) / n**0.5
    return cls(spectrum(n, cond, batch, generator), U)


def low_rank_matrix(P: LowRankPlusDiag) -> Tensor:
    assert isinstance(P.base, Diagonal) and isinstance(P.U, Tensor)
    weight = 1.0 if P.weight is None else P.weight
    return torch.diag(P.base.values) + weight * P.U @ P.U.mT


def make_blocks(cls: Any, n: int, cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Any:
    k = (n + 1) // 2
    sizes = [k, n - k] if n > 1 else [1]
    order = torch.randperm(n, generator=generator)
    return cls([Dense(spd(s, cond, batch, generator)) for s in sizes], indices=list(order.split(sizes)))


def block_matrix(P: BlockDiag) -> Tensor:
    rows = torch.eye(P.size, dtype=P.dtype)
    parts = [
        rows[index].T @ block.matrix @ rows[index]
        for block, index in zip(P.blocks, P.indices.blocks, strict=True)
    ]
    return torch.stack(parts).sum(0)


def make_downdate(cls: Any, n: int, cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Any:
    U = torch.randn(*batch, n, 1, dtype=torch.float64, generator=generator) / n**0.5
    smallest = 10.0**-cond
    U = U * (0.5 * smallest) ** 0.5 / U.norm(dim=(-2, -1), keepdim=True)
    return make_kronecker(KroneckerSum, n, cond, batch, generator).downdate(U)._with(cls)


def downdated_matrix(P: Woodbury) -> Tensor:
    assert isinstance(P.base, KroneckerSum) and isinstance(P.U, Tensor)
    return kronecker_matrix(P.base) - P.U @ P.U.mT * (1.0 if P.weight is None else P.weight)


class Blocks(BlockDiag):
    """Keeps its type where it is made anew."""

    def with_blocks(self, blocks: Sequence[PrecisionOperator]) -> BlockDiag:
        return super().with_blocks(blocks)._with(type(self))


class Downdate(Woodbury):
    """Keeps its type where it is scaled."""

    def _scale(self, c: Tensor) -> Woodbury:
        return super()._scale(c)._with(type(self))


SOILS = {
    "diagonal": Soil(Diagonal, make_diagonal, lambda P: torch.diag(P.values)),
    "Kronecker": Soil(KroneckerSum, make_kronecker, kronecker_matrix),
    "low rank": Soil(LowRankPlusDiag, make_low_rank, low_rank_matrix),
    "blocks": Soil(Blocks, make_blocks, block_matrix),
    "downdate": Soil(Downdate, make_downdate, downdated_matrix),
}
