"""Feature operators: rows ``(N, R, D)`` in the space of a precision operator, in factored form."""

from curvlin.features.base import FeatureOperator
from curvlin.features.block import BlockFeatures
from curvlin.features.combined import CombinedFeatures
from curvlin.features.dense import DenseFeatures
from curvlin.features.khatri_rao import KhatriRaoFeatures

__all__ = ["BlockFeatures", "CombinedFeatures", "DenseFeatures", "FeatureOperator", "KhatriRaoFeatures"]
