"""Networks and data as operators: exact layer-wise curvature, Laplace posteriors and their predictions."""

from curvlin_nn import errors, feature_maps, likelihoods, structures
from curvlin_nn.curvature import curvature
from curvlin_nn.laplace import Laplace
from curvlin_nn.parameters import ParameterSpace

__all__ = ["Laplace", "ParameterSpace", "curvature", "errors", "feature_maps", "likelihoods", "structures"]
