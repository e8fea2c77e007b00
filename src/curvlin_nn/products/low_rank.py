"""`low_rank`: the leading part of a model's curvature, and what is left of its trace."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from curvlin.iterative.results import LowRankApproximation
from curvlin_nn import likelihoods
from curvlin_nn.batches import Labelled
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import Columns
from curvlin_nn.curvature import accumulate
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import Selection
from curvlin_nn.products.dual import from_rows
from curvlin_nn.products.rows import RecordedRows
from curvlin_nn.structures.low_rank import LowRank, check_numbers

METHODS = ("nystrom", "dual")
"""How `low_rank` approximates."""


@outside_inference_mode()
def low_rank(
    model: nn.Module,
    likelihood: str | Likelihood,
    loader: Iterable[Any],
    rank: int,
    columns: str = "exact",
    subset_of_weights: Selection = "all",
    *,
    method: str = "nystrom",
    oversampling: int = 10,
    passes: int = 2,
    n_columns: int = 1,
    generator: torch.Generator | None = None,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> LowRankApproximation:
    """``H ~ U U^T`` from below, in float64, with the exact trace of the difference; see `structures.LowRank`.

    Args:
        model: maps one argument to outputs ``(N, *T, C)``; it comes back as it was.
        likelihood: ``"classification"``, ``"regression"`` or a `Likelihood`.
        loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`; iterated `passes` times,
            or once for "dual".
        rank: the columns of U at most.
        columns: as in `curvature`; of "mc" and "sketch" it is the matrix drawn in the last pass.
        subset_of_weights: as in `curvature`.
        method: "nystrom", randomised; or "dual", the best of its rank, which keeps all R rows of the data (samples
            times columns) and decomposes their R x R kernel: for few data.
        oversampling: columns more that are multiplied.
        passes: over the data.
        n_columns: how many for "mc" and "sketch", for each sample.
        generator: source of randomness; None is torch's default generator.
        dict_key_y: the name of the targets in loaders that yield mappings.
        progress_bar: whether to show one.

    Raises:
        UnsupportedError: for a model or option that is not served.
        DataError: for a batch that cannot be used.
        OutputError: for outputs of the wrong shape, or not finite.
    """
    if method not in METHODS:
        raise UnsupportedError(f"method={method!r} is not supported; expected {one_of(METHODS)}")
    check_numbers(rank, oversampling, passes)
    loader = Labelled(loader, dict_key_y)
    family, kind = likelihoods.resolve(likelihood), Columns(columns, n_columns, generator)
    if method == "dual":
        with random_state_kept(device_of(model)):  # loaders draw from the default generator
            rows = list(RecordedRows(model, family, loader, subset_of_weights, kind, progress_bar))
        return from_rows(rows, rank)
    accumulated = accumulate(
        model,
        family,
        loader,
        subset_of_weights,
        [partial(LowRank, rank=rank, oversampling=oversampling, passes=passes, generator=generator)],
        columns=kind,
        progress_bar=progress_bar,
    )
    (state,) = accumulated.states
    assert isinstance(state, LowRank)
    return state.approximation()
