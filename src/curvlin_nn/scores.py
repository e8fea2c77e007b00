"""Scores of predictions on held-out data, batch by batch."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.metrics.regression import gaussian_surprise

Prediction = Tensor | tuple[Tensor, Tensor]
"""What `Laplace` returns: probabilities or rates, or mean and covariance."""


class Score(ABC):
    """A number that gets a batch of predictions at a time; smaller is better."""

    @abstractmethod
    def update(self, prediction: Prediction, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: predictions, the model's own outputs, and targets."""

    @abstractmethod
    def value(self) -> float:
        """The score of everything seen."""


def new_score(likelihood: Likelihood, loss: object | None) -> Callable[[], Score]:
    """What makes a score that has seen nothing.

    Args:
        likelihood: that of the targets.
        loss: None for the negative log-likelihood of the targets; a `torchmetrics.Metric`, of which every score has a
            copy of its own, reset; or a function of all predictions and targets.

    Raises:
        UnsupportedError: if it is none of these, or the likelihood has no predictive density.
    """
    if loss is None:
        if not likelihood.has_link and not likelihood.has_additive_noise:
            raise UnsupportedError(
                f"predictions of {likelihood.name} have no density of targets; give a loss"
            )
        return lambda: NegativeLogLikelihood(likelihood)
    if all(callable(getattr(loss, name, None)) for name in ("update", "compute", "reset")):
        return lambda: MetricScore(loss)
    if callable(loss):
        return lambda: FunctionScore(loss)
    raise UnsupportedError(
        f"loss must be None, a torchmetrics.Metric or a function of predictions and targets, found {loss!r:.60}"
    )


class NegativeLogLikelihood(Score):
    """In nats for each sample: of probabilities or rates, or of Gaussian predictions with the noise in them."""

    def __init__(self, likelihood: Likelihood) -> None:
        self._likelihood, self._total, self._count = likelihood, 0.0, 0

    def update(self, prediction: Prediction, outputs: Tensor, targets: Tensor) -> None:
        """See `Score.update`."""
        self._count += len(targets)
        if isinstance(prediction, tuple):
            mean, covariance = (part.double() for part in prediction)
            y = targets.double().reshape(len(targets), -1)
            self._total += float(gaussian_surprise(mean, covariance, y).sum())
            return
        likelihood = self._likelihood
        checked = likelihood.check(outputs, targets, "held-out data")
        terms = likelihood.inverse_link(likelihood.terms(prediction.double().reshape(outputs.shape)))
        statistics = likelihood.statistics(likelihood.outputs(terms, outputs), checked)
        one = torch.ones((), dtype=torch.float64, device=statistics.device)
        self._total -= float(likelihood.log_likelihood(statistics, one))

    def value(self) -> float:
        """See `Score.value`."""
        return self._total / self._count


class MetricScore(Score):
    """A `torchmetrics.Metric`, or what has its methods; one that is better when higher counts negatively."""

    def __init__(self, metric: Any) -> None:
        self._metric = copy.deepcopy(metric)
        self._metric.reset()
        self._sign = -1.0 if getattr(metric, "higher_is_better", None) else 1.0
        self._arity = _arity(metric.update)

    def update(self, prediction: Prediction, outputs: Tensor, targets: Tensor) -> None:
        """See `Score.update`."""
        self._metric.update(*_arguments(prediction, self._arity), targets)

    def value(self) -> float:
        """See `Score.value`."""
        return self._sign * float(self._metric.compute().sum())


class FunctionScore(Score):
    """A function ``(prediction, targets)``, or ``(mean, covariance, targets)``, of all samples at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._arity = function, _arity(function)
        self._seen: list[tuple[Tensor, ...]] = []

    def update(self, prediction: Prediction, outputs: Tensor, targets: Tensor) -> None:
        """See `Score.update`."""
        self._seen.append((*_arguments(prediction, self._arity), targets))

    def value(self) -> float:
        """See `Score.value`."""
        return float(self._function(*(torch.cat(parts) for parts in zip(*self._seen, strict=True))))


def _arguments(prediction: Prediction, arity: int) -> tuple[Tensor, ...]:
    """Mean and covariance if they are asked for, the mean alone if not."""
    if isinstance(prediction, Tensor):
        return (prediction,)
    return prediction if arity >= 3 else prediction[:1]


def _arity(function: Callable[..., Any]) -> int:
    """How many positional arguments a function takes without a default; two where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
