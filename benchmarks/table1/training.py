"""What the trained baselines share: the steps that a budget allows, and the layout of images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor


def minibatches(
    n: int, batch_size: int, n_steps: int, seconds: float, generator: torch.Generator
) -> Iterator[tuple[float, Int[Tensor, " B"]]]:
    """Epoch after epoch of shuffled indices, until the steps or the time are used up.

    Args:
        n: size of the data set.
        batch_size: indices per step; the last step of an epoch may have fewer.
        n_steps: the most steps.
        seconds: the most CPU time of this process, also that which the caller spends between steps. A run that stays
            below its share of it at every step depends on `generator` only.
        generator: shuffles.

    Yields:
        The share of the budget that is spent, in [0, 1), for learning rates to follow, and the indices.
    """
    start, step = time.process_time(), 0
    while True:
        for indices in torch.randperm(n, generator=generator).split(batch_size):
            spent = max(step / n_steps, (time.process_time() - start) / seconds)
            if spent >= 1:
                return
            yield spent, indices
            step += 1


def anneal(optimizer: torch.optim.Optimizer, spent: float) -> None:
    """Learning rates fall from their initial values to zero along half a cosine."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * (1 + math.cos(math.pi * spent)) / 2


def channels_last(x: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
    """Images with channels last in memory, which convolutions on a CPU are twice as fast with; others as they are."""
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
