"""Networks and data as operators: exact layer-wise curvature, Laplace posteriors and their predictions."""

from curvlin_nn import errors, feature_maps, likelihoods, metrics, plots, structures, subnetwork
from curvlin_nn.curvature import curvature
from curvlin_nn.enums import (
    FeatureReduction,
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from curvlin_nn.held_out import HeldOutOptimum
from curvlin_nn.laplace import Laplace
from curvlin_nn.online import OnlineLaplace, marglik_training
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.prior_projection import project_prior
from curvlin_nn.prior_search import Optimum
from curvlin_nn.products.eigenpairs import hessian_eigenpairs
from curvlin_nn.products.low_rank import low_rank
from curvlin_nn.products.matrix_free import from_linear_operator, matrix_free

__all__ = [
    "FeatureReduction",
    "HeldOutOptimum",
    "HessianStructure",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "OnlineLaplace",
    "Optimum",
    "ParameterSpace",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
    "curvature",
    "errors",
    "feature_maps",
    "from_linear_operator",
    "hessian_eigenpairs",
    "likelihoods",
    "low_rank",
    "marglik_training",
    "matrix_free",
    "metrics",
    "plots",
    "project_prior",
    "structures",
    "subnetwork",
]
