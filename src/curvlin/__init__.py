"""Structured precision operators with exact solves, determinants, samples and marginals.

Knows nothing of neural networks; `curvlin_nn` builds on it.
"""

from curvlin import algebra as _algebra  # fills the tables
from curvlin.covariance import Covariance
from curvlin.errors import (
    InexactPathError,
    NotClosedError,
    NotConvergedError,
    NotPositiveDefiniteError,
    StaleFactorError,
)
from curvlin.features.base import FeatureOperator
from curvlin.features.block import BlockFeatures
from curvlin.features.combined import CombinedFeatures
from curvlin.features.dense import DenseFeatures
from curvlin.features.khatri_rao import KhatriRaoFeatures
from curvlin.gaussian import Gaussian
from curvlin.iterative import Estimate, IterativePrecision, LowRankApproximation, Solution
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum
from curvlin.precision.low_rank import LowRankPlusDiag, Woodbury
from curvlin.precision.spectral import SpectralKronecker
from curvlin.projection import Projection

__all__ = [
    "BlockDiag",
    "BlockFeatures",
    "CombinedFeatures",
    "Covariance",
    "Dense",
    "DenseFeatures",
    "Diagonal",
    "Estimate",
    "FeatureOperator",
    "Gaussian",
    "InexactPathError",
    "Isotropic",
    "IterativePrecision",
    "KhatriRaoFeatures",
    "KroneckerSum",
    "LowRankApproximation",
    "LowRankPlusDiag",
    "NotClosedError",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "PrecisionOperator",
    "Projection",
    "Solution",
    "SpectralKronecker",
    "StaleFactorError",
    "Woodbury",
]

del _algebra
