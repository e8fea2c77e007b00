"""A fit that ends where held-out data say so.

Features without the residual prior variance know of no variance outside of their K directions: the more data there are,
the more certain the posterior becomes, also where the network is wrong. ELLA (Deng et al., 2022) stops in the middle
of the data then. With ``residual=True`` there is no such reason to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvlin._check import positive_integer
from curvlin_nn.batches import Labelled, batches
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.errors import DataError
from curvlin_nn.laplace import Laplace
from curvlin_nn.metrics import evaluate


@dataclass(frozen=True)
class EarlyStop:
    """How the score went.

    Attributes:
        n_data: the number of samples whose curvature the posterior holds now.
        scores: the mean negative log-likelihood of the held-out data, by the number of samples that it was after.
    """

    n_data: int
    scores: dict[int, float]


def fit_early_stopped(
    la: Laplace,
    train_loader: Iterable[Any],
    validation_loader: Iterable[Any],
    *,
    every: int = 1000,
    patience: int = 1,
    progress_bar: bool = False,
    **prediction: Any,
) -> EarlyStop:
    """Fit batch by batch, and keep the sums with the best negative log-likelihood of held-out data.

    The prior is the same at all times. (The published script scales it down by the share of the data seen.)

    Args:
        la: what is fitted; what it held before is forgotten.
        train_loader: batches ``(inputs, targets)``, in an order that does not matter.
        validation_loader: other data, gone through several times.
        every: how many samples there are at least between two scores.
        patience: how many scores in a row may be no better than the best before the fit ends.
        progress_bar: whether to show one over the training data.
        **prediction: options of `Laplace.__call__` for the scores, such as ``link_approx="mc"``.

    Returns:
        The scores, and where the fit ended. If anything raises, `la` is as it was before.

    Raises:
        DataError: if a loader yields nothing.
        UnsupportedError: for a likelihood without such a score; see `curvlin_nn.metrics.evaluate`.
    """
    every, patience = positive_integer("every", every), positive_integer("patience", patience)
    trial = copy.copy(la)
    scores: dict[int, float] = {}
    best: dict[str, Any] | None = None
    with random_state_kept(device_of(la.model)):
        for position, data in enumerate(_groups(train_loader, la, every, progress_bar)):
            trial.fit(data, override=position == 0)
            score = evaluate(trial, validation_loader, ["nll"], **prediction)["nll"]
            if score < min(scores.values(), default=math.inf):
                best = copy.deepcopy(trial.state_dict())
            scores[trial.n_data] = score
            if len(scores) - 1 - list(scores.values()).index(min(scores.values())) >= patience:
                break
    if best is None:
        raise DataError("train_loader yielded no batch, expected at least one (inputs, targets)")
    la.load_state_dict(best)
    return EarlyStop(la.n_data, scores)


def _groups(
    loader: Iterable[Any], la: Laplace, every: int, progress_bar: bool
) -> Iterator[list[tuple[Any, Tensor]]]:
    """Batches of at least so many samples together."""
    group: list[tuple[Any, Tensor]] = []
    for batch in batches(Labelled(loader, la.dict_key_y), device_of(la.model), progress_bar):
        group.append(batch)
        if sum(len(targets) for _, targets in group) >= every:
            yield group
            group = []
    if group:
        yield group
