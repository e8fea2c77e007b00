"""Operators to compare a given one with: some that exceed it, some to add to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.testing.cases import Case


def larger(P: PrecisionOperator) -> Iterator[tuple[str, PrecisionOperator]]:
    """Operators that exceed P in the Loewner order, each by the scale of P, where the sum is closed."""
    yield "2 P", 2 * P
    level = P.diagonal().detach().mean(-1)
    with contextlib.suppress(NotClosedError):
        yield "P + c I", P + Isotropic(level, P.size)
    U = torch.randn(P.size, 2, dtype=P.dtype, generator=torch.Generator().manual_seed(5))
    yield "P + U U^T", P.update(U * level.sqrt()[..., None, None])


def summands(case: Case) -> Iterator[tuple[str, PrecisionOperator]]:
    """Operators of other structures, of the scale of the case."""
    generator = case.generator(31)
    level = case.operator.diagonal().detach().mean()
    d = level * (0.5 + torch.rand(case.size, dtype=torch.float64, generator=generator)).to(case.dtype)
    yield "Isotropic", Isotropic(level, case.size)
    yield "Diagonal", Diagonal(d)
    yield "itself", case.operator
    U = torch.randn(case.size, 2, dtype=torch.float64, generator=generator).to(case.dtype)
    yield "low rank", Diagonal(d).update(U * level.sqrt())
    yield "Dense", Dense(torch.diag(d) + level / case.size)
