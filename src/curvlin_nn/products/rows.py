"""The rows ``S^T J`` of all data, batch by batch, and the products with the matrix that they are a root of.

``H X = sum_n Phi_n^T (Phi_n X)`` with ``Phi_n = S_n^T J_n`` in factored form, for all columns of X at once: two matrix
products for each layer, and neither forward-mode nor double-backward autodiff. Rows that are kept take
``V sum_l S_l (in_l + out_l)`` numbers for each sample, V columns and S_l positions; rows that are not are recorded
again, forward and backward, for each product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin import BlockFeatures
from curvlin_nn.batches import Passes, choose
from curvlin_nn.capture import Recorder
from curvlin_nn.capture.state import random_state_kept
from curvlin_nn.columns import Columns
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import Selection


class RecordedRows:
    """Rows recorded anew each time they are iterated over.

    Args:
        model: maps one argument to outputs; it comes back as it was.
        likelihood: of the outputs.
        loader: batches ``(inputs, targets)``.
        subset_of_weights: see `curvlin_nn.curvature`.
        columns: S.
        progress_bar: whether to show one.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        loader: Iterable[Any],
        subset_of_weights: Selection,
        columns: Columns,
        progress_bar: bool = False,
    ) -> None:
        self._model, self._likelihood = model, likelihood
        self._subset, self._columns = subset_of_weights, columns
        self._passes = Passes(loader, model, progress_bar)
        self._recorder: Recorder | None = None

    def __iter__(self) -> Iterator[BlockFeatures]:
        """The rows, a batch and some columns at a time.

        Raises:
            DataError: if the loader yields nothing, or another number of samples than the first time.
        """
        for where, x, targets in self._passes:
            if self._recorder is None:
                self._recorder = Recorder(self._model, choose(self._model, self._subset, x, where))
            recording = self._recorder(x, where)
            targets = self._likelihood.check(recording.outputs, targets, where)
            for some in self._columns(self._likelihood, recording.outputs, targets):
                yield features(recording.captures(some))


def product_with(
    rows: Iterable[BlockFeatures], device: torch.device
) -> Callable[[Float[Tensor, "P K"]], Float[Tensor, "P K"]]:
    """``X -> sum_n Phi_n^T Phi_n X``, summed over batches in float64."""

    @outside_inference_mode()
    def multiply(X: Tensor) -> Tensor:
        total: Tensor | None = None
        with random_state_kept(device):  # loaders draw from the default generator
            for Phi in rows:
                product = Phi.T @ (Phi @ X)
                # One batch is no sum, and a wider copy of its product takes as long as the product.
                total = product if total is None else total.double().add_(product)
        return torch.zeros_like(X) if total is None else total.to(X.dtype)

    return multiply


def root_of(
    rows: Iterable[BlockFeatures], size: int, device: torch.device
) -> Callable[[Float[Tensor, "R K"]], Float[Tensor, "P K"]]:
    """``Z -> sum_n Phi_n^T z_n`` for one number in Z for each row."""

    @outside_inference_mode()
    def colour(Z: Tensor) -> Tensor:
        total = torch.zeros(size, Z.shape[-1], dtype=torch.float64, device=Z.device)
        start = 0
        with random_state_kept(device):
            for Phi in rows:
                stop = start + Phi.n_samples * Phi.n_rows
                total += Phi.T @ Z[start:stop].unflatten(0, (Phi.n_samples, Phi.n_rows))
                start = stop
        return total.to(Z.dtype)

    return colour
