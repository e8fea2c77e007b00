"""Operators that exceed a given one, for the laws of monotonicity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.diagonal import Isotropic


def larger(P: PrecisionOperator) -> Iterator[tuple[str, PrecisionOperator]]:
    """Operators that exceed P in the Loewner order, each by the scale of P, where the sum is closed."""
    yield "2 P", 2 * P
    level = P.diagonal().detach().mean(-1)
    with contextlib.suppress(NotClosedError):
        yield "P + c I", P + Isotropic(level, P.size)
    U = torch.randn(P.size, 2, dtype=P.dtype, generator=torch.Generator().manual_seed(5))
    yield "P + U U^T", P.update(U * level.sqrt()[..., None, None])
