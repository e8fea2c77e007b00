"""Pictures of predictions and posteriors with matplotlib: each draws on an Axes and returns it.

Nothing is shown or written. Where no `ax` is given, the Axes is that of a new figure that pyplot does not know of:
``ax.figure.savefig(path)`` writes it, a notebook shows ``ax.figure``. Needs the extra ``plots``.
"""

from curvlin_nn.plots.posterior import evidence_curve, kronecker_factor, spectrum
from curvlin_nn.plots.prediction import (
    confidence_histogram,
    entropy_histograms,
    predictive_band,
    reliability_diagram,
)
from curvlin_nn.plots.surrogate import surrogate_training

__all__ = [
    "confidence_histogram",
    "entropy_histograms",
    "evidence_curve",
    "kronecker_factor",
    "predictive_band",
    "reliability_diagram",
    "spectrum",
    "surrogate_training",
]
