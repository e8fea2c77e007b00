"""The batches of a loader, and the parameters that a model's first batch decides about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from curvlin_nn.capture import last_layer
from curvlin_nn.capture.inputs import split_batch
from curvlin_nn.parameters import ParameterSpace, Selection


def batches(
    loader: Iterable[Any], device: torch.device, progress_bar: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """``(inputs, targets)`` batch by batch, targets on `device`."""
    for index, batch in enumerate(tqdm(loader, desc="curvature", disable=not progress_bar)):
        x, targets = split_batch(batch, f"batch {index}")
        yield x, targets.to(device)


def choose(model: nn.Module, subset_of_weights: Selection, x: Any, where: str) -> ParameterSpace:
    """The parameters that `subset_of_weights` names; the last layer is found by running the model on `x`."""
    if isinstance(subset_of_weights, str) and subset_of_weights == "last_layer":
        return last_layer(model, x, where)
    return ParameterSpace.of(model, subset_of_weights)
