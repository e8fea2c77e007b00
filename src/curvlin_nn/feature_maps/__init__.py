"""Feature maps: from an input to a model's outputs and the features that linearise them."""

from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.feature_maps.jacobian import JacobianMap, LastLayerMap
from curvlin_nn.feature_maps.kernel_error import KernelError, kernel_error
from curvlin_nn.feature_maps.nystrom import NystromMap
from curvlin_nn.feature_maps.restriction import RestrictedMap
from curvlin_nn.feature_maps.sketch import SketchMap
from curvlin_nn.feature_maps.surrogate import SurrogateMap
from curvlin_nn.feature_maps.surrogate_training import SurrogateHistory

__all__ = [
    "FeatureMap",
    "JacobianMap",
    "KernelError",
    "LastLayerMap",
    "NystromMap",
    "RestrictedMap",
    "SketchMap",
    "SurrogateHistory",
    "SurrogateMap",
    "kernel_error",
]
