"""Metrics of a posterior over a loader, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from curvlin._check import positive_integer
from curvlin_nn.capture.inputs import split_batch
from curvlin_nn.errors import DataError, OutputError, UnsupportedError, one_of
from curvlin_nn.likelihoods import Bernoulli, Categorical
from curvlin_nn.metrics import regression
from curvlin_nn.metrics._check import distributions, gaussians, labels
from curvlin_nn.metrics.classification import entropy, max_probability
from curvlin_nn.metrics.ood import aupr, auroc, scikit_learn
from curvlin_nn.metrics.running import Running, of_classes, of_gaussians
from curvlin_nn.predictive import PosteriorPredictive

Prediction = Tensor | tuple[Tensor, Tensor]
"""Probabilities with classes along the last axis, or mean and variance."""

LEVELS = (0.5, 0.9, 0.95)
"""The default nominal levels of ``"coverage"``."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy,
    "max_probability": lambda p: 1 - max_probability(p),
}
"""What tells inputs out of distribution from those within, by name."""

DETECTION = {"auroc": auroc, "aupr": aupr}
"""The metrics of such scores."""


def evaluate(
    la: PosteriorPredictive | Callable[[Any], Prediction],
    loader: Iterable[Any],
    metrics: Sequence[str] | None = None,
    *,
    ood_loader: Iterable[Any] | None = None,
    ood_score: str = "entropy",
    n_bins: int = 15,
    levels: Sequence[float] = LEVELS,
    ignore_index: int | None = None,
    dict_key_y: str | None = None,
    progress_bar: bool = False,
    **prediction: Any,
) -> dict[str, float]:
    """Predict what a loader yields, and score the predictions.

    Kept are sums; only ``"adaptive_ece"`` keeps two numbers for each prediction, ``"auroc"`` and ``"aupr"`` one.

    Args:
        la: a fitted posterior (`Laplace` or a variational one) of classes, bits or Gaussian observations, which are
            predicted with their noise; or a function of inputs that returns probabilities with classes along the last
            axis, or mean and variance (of outputs, or covariances). ``lambda x: model(x).softmax(-1)`` is the network
            without its posterior.
        loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`.
        metrics: ``"nll"``, ``"accuracy"``, ``"ece"``, ``"adaptive_ece"`` and ``"brier"`` of probabilities; ``"nll"``,
            ``"rmse"``, ``"crps"``, ``"coverage"`` and ``"sharpness"`` of Gaussians; ``"auroc"`` and ``"aupr"`` with
            `ood_loader`. None takes all that apply.
        ood_loader: batches ``(inputs, targets)`` out of distribution; of their targets, only which are ignored counts.
        ood_score: ``"entropy"`` or ``"max_probability"`` (one minus it); of Gaussians it is the mean variance of a
            sample's outputs, whatever is named here.
        n_bins: of the calibration errors.
        levels: the nominal levels of ``"coverage"``, reported as ``"coverage_0.95"``.
        ignore_index: the label of targets that do not count; None takes that of the likelihood, if it has one.
        dict_key_y: the name of the targets in loaders that yield mappings; None takes that of the posterior, and
            ``"labels"`` for a function.
        progress_bar: whether to show one.
        **prediction: options of `PosteriorPredictive.__call__`, such as ``link_approx="mc"``.

    Returns:
        The metrics by name, each as if computed from all predictions at once. Class weights do not count.

    Raises:
        UnsupportedError: for a metric, likelihood or option that is not served.
        DataError: if targets do not fit, a loader yields nothing, or no target counts.
        OutputError: if a prediction is no distribution.
        ImportError: for ``"auroc"`` and ``"aupr"`` without the extra ``metrics``.
    """
    if ood_score not in SCORES:
        raise UnsupportedError(f"ood_score={ood_score!r} is not supported; expected {one_of(SCORES)}")
    catalogs = (
        of_classes(positive_integer("n_bins", n_bins)),
        of_gaussians(regression.levels(levels).reshape(-1).tolist()),
    )
    wanted = _wanted(metrics, {name for catalog in catalogs for name in catalog}, ood_loader is not None)
    if (
        ignore_index is None
        and isinstance(la, PosteriorPredictive)
        and isinstance(la.likelihood, Categorical)
    ):
        ignore_index = la.likelihood.ignore_index
    if dict_key_y is None:
        dict_key_y = la.dict_key_y if isinstance(la, PosteriorPredictive) else PosteriorPredictive.dict_key_y
    question = _Question(
        la, prediction, ignore_index, dict_key_y, SCORES[ood_score], with_covariance="nll" in wanted
    )
    running: dict[str, Running] = {}
    detection = {name: metric for name, metric in DETECTION.items() if name in wanted}
    if detection:
        scikit_learn()  # say now that it is missing
    scores: list[Tensor] = []
    n_targets = 0
    for found, targets in question.answers(loader, progress_bar):
        catalog = catalogs[isinstance(found, tuple)]
        running = running or _chosen(catalog, wanted, everything=metrics is None)
        batch = question.checked(found, targets)
        n_targets += len(batch[-1])
        if len(batch[-1]):
            for metric in running.values():
                metric.update(*batch)
        if detection:
            scores.append(question.scores(found, targets))
    if n_targets == 0:
        raise DataError("the loader yielded no target that counts, expected at least one")
    result = {name: float(value) for metric in running.values() for name, value in metric.result().items()}
    if detection and ood_loader is not None:
        outside = [question.scores(*answer) for answer in question.answers(ood_loader, progress_bar)]
        if not outside:
            raise DataError("ood_loader yielded no batch, expected at least one (inputs, targets)")
        pair = torch.cat(scores), torch.cat(outside)
        result |= {name: float(metric(*pair)) for name, metric in detection.items()}
    return result


def _wanted(metrics: Sequence[str] | None, offered: set[str], with_outside: bool) -> set[str]:
    detection = set(DETECTION) if with_outside else set()
    if metrics is None:
        return offered | detection
    if isinstance(metrics, str):
        raise UnsupportedError(f"metrics must be a list of names, found the string {metrics!r}")
    for name in metrics:
        if name in DETECTION and not with_outside:
            raise UnsupportedError(
                f"metric {name!r} compares with inputs out of distribution; give ood_loader"
            )
        if name not in offered | detection:
            raise UnsupportedError(
                f"metric {name!r} is not supported; expected {one_of(sorted(offered | set(DETECTION)))}"
            )
    return set(metrics)


def _chosen(catalog: Mapping[str, Running], wanted: set[str], *, everything: bool) -> dict[str, Running]:
    """The metrics that are asked for; where these are not simply all, the catalog must have them."""
    missing = sorted(wanted - catalog.keys() - DETECTION.keys())
    if missing and not everything:
        raise UnsupportedError(
            f"metric {missing[0]!r} does not apply to these predictions; expected {one_of(catalog)}"
        )
    return {name: metric for name, metric in catalog.items() if name in wanted}


@dataclass(frozen=True)
class _Question:
    """How predictions are asked for and read."""

    la: PosteriorPredictive | Callable[[Any], Prediction]
    options: Mapping[str, Any]
    ignore_index: int | None
    dict_key_y: str
    score: Callable[[Tensor], Tensor]
    with_covariance: bool

    def answers(self, loader: Iterable[Any], progress_bar: bool) -> Iterator[tuple[Prediction, Tensor]]:
        """Predictions and targets in shapes that fit, batch by batch."""
        for index, batch in enumerate(tqdm(loader, desc="evaluation", disable=not progress_bar)):
            x, targets = split_batch(batch, f"batch {index}", self.dict_key_y)
            with torch.no_grad():
                if isinstance(self.la, PosteriorPredictive):
                    found = self._of_posterior(self.la, x)
                    targets = _laid_out(targets, found[0] if isinstance(found, tuple) else found[..., 0])
                else:
                    found = self._of(self.la, x)
            yield found, targets.to((found[0] if isinstance(found, tuple) else found).device)

    def _of_posterior(self, la: PosteriorPredictive, x: Any) -> Prediction:
        if isinstance(la.likelihood, (Categorical, Bernoulli)):
            found = la(x, **self.options)
            assert isinstance(found, Tensor)
            return la.likelihood.terms(found)
        if la.likelihood.has_additive_noise:
            wanted = {"observation_noise": True, "diagonal_output": not self.with_covariance}
            return la(x, **{**wanted, **self.options})
        raise UnsupportedError(
            f"metrics of {la.likelihood.name} are not supported; expected classification, binary, regression or "
            "heteroscedastic, or a function that returns probabilities, or mean and variance"
        )

    def _of(self, predict: Callable[[Any], Prediction], x: Any) -> Prediction:
        if self.options:
            raise UnsupportedError(f"a function takes no options, found {one_of(self.options)}")
        found = predict(x)
        if not isinstance(found, Tensor) and not (isinstance(found, tuple) and len(found) == 2):
            raise OutputError(
                f"a prediction must be probabilities, or a pair of mean and variance, found {type(found).__name__}"
            )
        return found

    def checked(self, found: Prediction, targets: Tensor) -> tuple[Tensor, ...]:
        """``(p, y)`` or ``(mean, spread, y)``, without what is ignored."""
        if isinstance(found, tuple):
            return gaussians(*found, targets)
        return labels(distributions(found), targets, self.ignore_index, found.shape[-1])

    def scores(self, found: Prediction, targets: Tensor) -> Tensor:
        """One number for each prediction that counts: the larger, the less certain."""
        if isinstance(found, tuple):
            mean, spread, _ = gaussians(*found, found[0])
            return regression.variances(spread).reshape(len(mean), -1).mean(-1)
        values = self.score(found).flatten()
        return values if self.ignore_index is None else values[targets.flatten() != self.ignore_index]


def _laid_out(targets: Tensor, like: Tensor) -> Tensor:
    """Targets in the order of a likelihood's terms, in which a sample's targets come as they stand."""
    fits = targets.shape[:1] == like.shape[:1] and targets.numel() == like.numel()
    return targets.reshape(like.shape) if fits else targets
