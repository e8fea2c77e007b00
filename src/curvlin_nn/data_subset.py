"""A random subset of the data, drawn while they come by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from curvlin_nn.batches import batches
from curvlin_nn.capture.inputs import select_samples
from curvlin_nn.capture.state import random_state_kept
from curvlin_nn.errors import DataError
from curvlin_nn.randomness import frozen


def random_subset(
    loader: Iterable[Any],
    n_subset: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> list[tuple[Any, Tensor]]:
    """`n_subset` samples without replacement, each subset as probable as another; all of them if there are no more.

    Every sample gets a uniform random number as it comes, and those with the smallest numbers stay. So one pass over
    data of unknown length suffices, and no more than the subset and a batch are held.

    Args:
        loader: batches ``(inputs, targets)``.
        n_subset: the number of samples.
        device: where the targets go.
        generator: source of randomness; None is torch's default generator.
        progress_bar: whether to show one.

    Returns:
        What is left of each batch of which something is left, in the order of the loader.

    Raises:
        DataError: if the loader yields nothing.
    """
    keys, kept = torch.empty(0, dtype=torch.float64), []
    own = frozen(generator, torch.device("cpu"))()
    with random_state_kept(device):  # loaders draw from the default generator
        for x, targets in batches(loader, device, progress_bar):
            kept.append((x, targets))
            keys = torch.cat([keys, torch.rand(len(targets), generator=own, dtype=torch.float64)])
            if len(keys) > n_subset:
                chosen = torch.zeros(len(keys), dtype=torch.bool)
                chosen[keys.argsort()[:n_subset]] = True
                by_batch = chosen.split([len(targets) for _, targets in kept])
                kept = [
                    _selected(*batch, some) for batch, some in zip(kept, by_batch, strict=True) if some.any()
                ]
                keys = keys[chosen]
    if not kept:
        raise DataError("the loader yielded no batch, expected at least one (inputs, targets)")
    return kept


def _selected(x: Any, targets: Tensor, chosen: Tensor) -> tuple[Any, Tensor]:
    index = chosen.nonzero().squeeze(1)
    return select_samples(x, index, len(targets)), targets[index.to(targets.device)]
