"""How good predictions are: proper scores, calibration, sharpness and detection of what is out of distribution.

Each function takes the predictions and targets of a whole data set and returns a 0-dimensional float64 tensor;
`evaluate` asks a posterior batch by batch. Classes stand along the last axis of probabilities; an axis of length one
holds the probability of a one, as for the ``"binary"`` likelihood.
"""

from curvlin_nn.metrics.calibration import CalibrationBins, adaptive_ece, calibration_bins, ece
from curvlin_nn.metrics.classification import accuracy, brier, entropy, max_probability, nll
from curvlin_nn.metrics.evaluation import evaluate
from curvlin_nn.metrics.ood import aupr, auroc
from curvlin_nn.metrics.regression import (
    crps,
    crps_from_samples,
    gaussian_nll,
    interval_coverage,
    rmse,
    sharpness,
)

__all__ = [
    "CalibrationBins",
    "accuracy",
    "adaptive_ece",
    "aupr",
    "auroc",
    "brier",
    "calibration_bins",
    "crps",
    "crps_from_samples",
    "ece",
    "entropy",
    "evaluate",
    "gaussian_nll",
    "interval_coverage",
    "max_probability",
    "nll",
    "rmse",
    "sharpness",
]
