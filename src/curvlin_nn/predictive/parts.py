"""Many inputs or draws, some at a time: what bounds the memory of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture.inputs import can_be_cut, select_samples, tensors_of
from curvlin_nn.errors import OutputError

DRAW_BUDGET = 2**26
"""Entries of the tensor of posterior draws held at once."""

PROBED = 2
"""Samples of the first part, which tells how much memory one takes, and whether samples stand along axis 0: one sample
would not, if it is of as many time steps that come first."""


def count(x: Any, by_running: Callable[[Any], int]) -> int:
    """N, the number of samples in x; zero where x cannot be cut into samples.

    Args:
        x: what the model takes.
        by_running: tells N by a forward pass, where tensors of x differ in their length.
    """
    lengths = {len(tensor) for tensor in tensors_of(x) if tensor.ndim}
    if len(lengths) == 1:
        return lengths.pop()
    n_samples = by_running(x) if lengths else 0
    return n_samples if can_be_cut(x, n_samples) else 0


def cut(x: Any, n_samples: int, at_once: int) -> Iterator[tuple[Any, int]]:
    """Some samples at a time, and how many they are."""
    for start in range(0, n_samples, at_once):
        stop = min(start + at_once, n_samples)
        yield select_samples(x, slice(start, stop), n_samples), stop - start


def check_rows(outputs: Tensor, expected: int) -> None:
    """Whether a part of the samples has as many rows of outputs.

    Raises:
        OutputError: if it has not.
    """
    if len(outputs) != expected:
        raise OutputError(
            f"model outputs for {expected} samples must have as many rows, found {len(outputs)}; give inputs with "
            "samples along axis 0"
        )


def deviations(
    precision: PrecisionOperator, n_samples: int, generator: torch.Generator | None
) -> Iterator[Float[Tensor, "s P"]]:
    """Draws of ``N(0, P^-1)``, some at a time, as many in each part for one number of draws."""
    at_once = max(1, min(n_samples, DRAW_BUDGET // precision.size))
    for start in range(0, n_samples, at_once):
        yield precision.sample((min(at_once, n_samples - start),), generator=generator)
