"""What `evaluate` keeps of the batches seen, for each metric: sums where these are all it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlin_nn.metrics import regression
from curvlin_nn.metrics.calibration import CalibrationBins, equal_mass, equal_width
from curvlin_nn.metrics.classification import hits, squared_distance, surprise


class Running(ABC):
    """One metric over batches of checked predictions and targets, none of them empty."""

    @abstractmethod
    def update(self, *batch: Tensor) -> None:
        """Add ``(p, y)`` or ``(mean, spread, y)``."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """The metric by name, of everything seen; at least one batch was."""


class Mean(Running):
    """The mean of what `score` says of each term; `root` takes its square root."""

    def __init__(self, name: str, score: Callable[..., Tensor], *, root: bool = False) -> None:
        self.name, self.score, self.root = name, score, root
        self.total, self.count = torch.zeros((), dtype=torch.float64), 0

    def update(self, *batch: Tensor) -> None:
        """See `Running.update`."""
        values = self.score(*batch)
        self.total, self.count = self.total.to(values) + values.sum(), self.count + values.numel()

    def result(self) -> dict[str, Tensor]:
        """See `Running.result`."""
        mean = self.total / self.count
        return {self.name: mean.sqrt() if self.root else mean}


class Together(Running):
    """Several metrics that go by one name."""

    def __init__(self, parts: Sequence[Running]) -> None:
        self.parts = parts

    def update(self, *batch: Tensor) -> None:
        """See `Running.update`."""
        for part in self.parts:
            part.update(*batch)

    def result(self) -> dict[str, Tensor]:
        """See `Running.result`."""
        return {name: value for part in self.parts for name, value in part.result().items()}


class Calibration(Running):
    """The sums of equally wide bins."""

    def __init__(self, n_bins: int) -> None:
        self.n_bins = n_bins
        self.bins: list[CalibrationBins] = []

    def update(self, *batch: Tensor) -> None:
        """See `Running.update`."""
        p, y = batch
        found = equal_width(p.amax(-1), hits(p, y), self.n_bins)
        self.bins = [self.bins[0] + found if self.bins else found]

    def result(self) -> dict[str, Tensor]:
        """See `Running.result`."""
        return {"ece": self.bins[0].ece}


class AdaptiveCalibration(Running):
    """Two numbers for each prediction: bins of equally many are known at the end."""

    def __init__(self, n_bins: int) -> None:
        self.n_bins = n_bins
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, *batch: Tensor) -> None:
        """See `Running.update`."""
        p, y = batch
        self.kept.append((p.amax(-1), hits(p, y)))

    def result(self) -> dict[str, Tensor]:
        """See `Running.result`."""
        confidence, hit = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        return {"adaptive_ece": equal_mass(confidence, hit, self.n_bins).ece}


def of_classes(n_bins: int) -> dict[str, Running]:
    """The metrics of probabilities."""
    return {
        "nll": Mean("nll", lambda p, y: surprise(p.log(), y)),
        "accuracy": Mean("accuracy", hits),
        "ece": Calibration(n_bins),
        "adaptive_ece": AdaptiveCalibration(n_bins),
        "brier": Mean("brier", squared_distance),
    }


def of_gaussians(levels: Sequence[float]) -> dict[str, Running]:
    """The metrics of Gaussian predictions, with coverage at nominal levels."""

    def covered(level: float) -> Callable[..., Tensor]:
        return lambda *batch: (regression.central_probability(*batch) <= level).double()

    return {
        "nll": Mean("nll", regression.gaussian_surprise),
        "rmse": Mean("rmse", lambda mean, _, y: (y - mean).square(), root=True),
        "crps": Mean("crps", regression.ranked_probability),
        "coverage": Together([Mean(f"coverage_{level:g}", covered(level)) for level in levels]),
        "sharpness": Mean("sharpness", lambda _, spread, __: regression.variances(spread), root=True),
    }
