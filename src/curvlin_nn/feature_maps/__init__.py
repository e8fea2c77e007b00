"""Feature maps: from an input to a model's outputs and the features that linearise them."""

from curvlin_nn.feature_maps.base import FeatureMap
from curvlin_nn.feature_maps.jacobian import JacobianMap, LastLayerMap
from curvlin_nn.feature_maps.restriction import RestrictedMap

__all__ = ["FeatureMap", "JacobianMap", "LastLayerMap", "RestrictedMap"]
