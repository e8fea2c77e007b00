"""Structured precision operators with exact solves, determinants, samples and marginals.

Knows nothing of neural networks; `curvlin_nn` builds on it.
"""

from curvlin.errors import NotClosedError, NotPositiveDefiniteError, StaleFactorError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum, SpectralKronecker

__all__ = [
    "Dense",
    "Diagonal",
    "Isotropic",
    "KroneckerSum",
    "NotClosedError",
    "NotPositiveDefiniteError",
    "PrecisionOperator",
    "SpectralKronecker",
    "StaleFactorError",
]
