"""The batches of a loader, and the parameters that a model's first batch decides about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from curvlin_nn.capture import last_layer
from curvlin_nn.capture.inputs import split_batch
from curvlin_nn.capture.state import device_of
from curvlin_nn.errors import DataError, NotFittedError
from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.parameters import ParameterSpace, Selection


def batches(
    loader: Iterable[Any], device: torch.device, progress_bar: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """``(inputs, targets)`` batch by batch, targets on `device`."""
    for index, batch in enumerate(tqdm(loader, desc="curvature", disable=not progress_bar)):
        x, targets = split_batch(batch, f"batch {index}")
        yield x, targets.to(device)


class Labelled:
    """A loader of mappings that hold their targets under a name of their own.

    Args:
        loader: yields mappings, and may yield pairs.
        key: the name.
    """

    def __init__(self, loader: Iterable[Any], key: str) -> None:
        self._loader, self._key = loader, key

    def __iter__(self) -> Iterator[Any]:
        """Pairs ``(inputs, targets)``.

        Raises:
            DataError: if a mapping has no tensor under the name.
        """
        for index, batch in enumerate(self._loader):
            yield split_batch(batch, f"batch {index}", self._key)

    def __len__(self) -> int:
        """The number of batches, if the loader knows it."""
        return len(self._loader)  # type: ignore[arg-type]  # raises where it has none


class Passes:
    """A loader that is gone through several times, with as many samples each time.

    Args:
        loader: batches ``(inputs, targets)``.
        model: where targets go is where it is.
        progress_bar: whether to show one for each pass.
    """

    def __init__(self, loader: Iterable[Any], model: nn.Module, progress_bar: bool = False) -> None:
        self._loader, self._model, self._progress_bar = loader, model, progress_bar
        self._n_data: int | None = None

    def __iter__(self) -> Iterator[tuple[str, Any, Tensor]]:
        """What to call each batch, its inputs and its targets.

        Raises:
            DataError: if the loader yields nothing, or another number of samples than the first time.
        """
        n_data = 0
        for index, (x, targets) in enumerate(
            batches(self._loader, device_of(self._model), self._progress_bar)
        ):
            n_data += len(targets)
            yield f"batch {index}", x, targets
        if n_data == 0:
            raise DataError("the loader yielded no batch, expected at least one (inputs, targets)")
        self.check_count(n_data)
        self._n_data = n_data

    def check_count(self, n_data: int) -> None:
        """Whether another pass saw as many samples.

        Raises:
            DataError: if it did not.
        """
        if self._n_data not in (None, n_data):
            raise DataError(
                f"two passes over the loader yielded {self._n_data} and {n_data} samples, expected the same; give a "
                "loader that can be iterated several times"
            )


def choose(model: nn.Module, subset_of_weights: Selection | FeatureMap, x: Any, where: str) -> ParameterSpace:
    """The parameters that `subset_of_weights` names, or the coordinates of a feature map.

    The last layer is found by running the model on `x`; a map that knows its coordinates only then, likewise.
    """
    if isinstance(subset_of_weights, FeatureMap):
        try:
            return subset_of_weights.space
        except NotFittedError:
            subset_of_weights.record(x, where)
            return subset_of_weights.space
    if isinstance(subset_of_weights, str) and subset_of_weights == "last_layer":
        return last_layer(model, x, where)
    return ParameterSpace.of(model, subset_of_weights)
