"""The columns of the table, from what a row predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlin_nn import metrics

N_BINS = 15
"""Of the calibration error, equally wide."""

N_HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class Predicted:
    """Of one data set.

    Attributes:
        log_probabilities: of the mean prediction, ``(N, C)``, normalised in float64.
        log_determinants: of the covariances of Gaussian logits, ``(N,)``; None where there are none.
    """

    log_probabilities: Tensor
    log_determinants: Tensor | None

    def entropies(self, n_softmax: int = 1) -> Tensor:
        """In nats, of the probabilities; or of another softmax of these, as the published script has it."""
        p = self.log_probabilities.exp()
        for _ in range(n_softmax - 1):
            p = p.softmax(-1)
        return torch.special.entr(p).sum(-1)

    def surprises(self, y: Tensor) -> Tensor:
        """``-log p[y]``, ``(N,)``."""
        return -self.log_probabilities.gather(-1, y[:, None]).squeeze(-1)


def scores(
    test: Predicted, y: Tensor, outside: Mapping[str, Predicted], n_softmax_as_published: int
) -> dict[str, float | None]:
    """All columns of a row.

    Args:
        test: in distribution.
        y: its labels.
        outside: out of distribution, by name.
        n_softmax_as_published: how often the published script takes a softmax before the entropy: twice for methods
            whose logits are Gaussian (or certain), once for those that draw.
    """
    p = test.log_probabilities.exp()
    found: dict[str, float | None] = {
        "ACC": 100 * float(metrics.accuracy(p, y)),
        "NLL": float(metrics.nll(test.log_probabilities, y, log=True)),
        "ECE": float(metrics.ece(p, y, N_BINS)),
        "Brier": float(metrics.brier(p, y)),
    }
    for name, other in outside.items():
        as_published = [of.entropies(n_softmax_as_published) for of in (test, other)]
        found[f"AUC {name}"] = float(metrics.auroc(test.entropies(), other.entropies()))
        found[f"AUC {name}, as published"] = float(metrics.auroc(*as_published))
        gaussian = None
        if test.log_determinants is not None and other.log_determinants is not None:
            gaussian = float(metrics.auroc(test.log_determinants, other.log_determinants))
        found[f"Gaussian AUC {name}"] = gaussian
    return found


def scores_as_published(
    test: Predicted, y: Tensor, outside: Mapping[str, Predicted], n_softmax: int
) -> dict[str, float | None]:
    """The columns that draws of the published script would have it print, by names that say so; see `scores`."""
    found = scores(test, y, outside, n_softmax)
    plain = {f"{name}, as published": found[name] for name in ("ACC", "NLL", "ECE")}
    return plain | {name: found[name] for name in (f"AUC {other}, as published" for other in outside)}


def difference(surprises: Tensor, reference: Tensor) -> dict[str, float]:
    """The mean paired difference of two methods' ``-log p[y]``, and its standard error over images."""
    d = surprises - reference
    return {"mean": float(d.mean()), "standard error": float(d.std()) / math.sqrt(len(d))}


def histograms(predicted: Mapping[str, Predicted]) -> dict[str, Any]:
    """Counts of entropies, and of halved log-determinants, in bins that all data sets share."""
    kinds: dict[str, dict[str, Tensor]] = {
        "entropy": {name: of.entropies() for name, of in predicted.items()},
        "Gaussian entropy": {
            name: of.log_determinants / 2 for name, of in predicted.items() if of.log_determinants is not None
        },
    }
    return {kind: _histogram(list(values), list(values.values())) for kind, values in kinds.items() if values}


def _histogram(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Any]:
    low, high = (float(f(torch.cat(list(values)))) for f in (torch.min, torch.max))
    edges = torch.linspace(low, max(high, low + 1e-9), N_HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = {
        name: torch.histogram(of.double(), edges)[0].long().tolist()
        for name, of in zip(names, values, strict=True)
    }
    return {"edges": edges.tolist(), "counts": counts}
