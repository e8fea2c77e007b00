"""Draws of a posterior, some at a time: what bounds the memory of a prediction by many."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin.precision.base import PrecisionOperator

DRAW_BUDGET = 2**26
"""Entries of the tensor of posterior draws held at once."""


def some_at_a_time(n_samples: int, size: int) -> Iterator[int]:
    """How many draws of vectors of this size to make at once, part by part; the same for one number of draws."""
    at_once = max(1, min(n_samples, DRAW_BUDGET // size))
    for start in range(0, n_samples, at_once):
        yield min(at_once, n_samples - start)


def deviations(
    precision: PrecisionOperator, n_samples: int, generator: torch.Generator | None
) -> Iterator[Float[Tensor, "s P"]]:
    """Draws of ``N(0, P^-1)``, some at a time."""
    for some in some_at_a_time(n_samples, precision.size):
        yield precision.sample((some,), generator=generator)
