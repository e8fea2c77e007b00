"""Predictions: a distribution over a model's outputs, and what its likelihood makes of it.

linearised      the Gaussian over outputs of the linearised network (``pred_type="glm"``)
weight_space    outputs of the network itself at draws of the weights (``pred_type="nn"``)
response        from outputs to what is predicted: probabilities, rates, moments, targets
output_gaussian what predictions need of any Gaussian over outputs
predictor       answers to requests, from either
posterior_predictive  the methods of a posterior that ask
prediction      what `predict` returns
"""

from curvlin_nn.predictive.linearised import Predictive
from curvlin_nn.predictive.links import check_link, draw
from curvlin_nn.predictive.output_gaussian import OutputGaussian
from curvlin_nn.predictive.posterior_predictive import PosteriorPredictive
from curvlin_nn.predictive.prediction import Prediction
from curvlin_nn.predictive.predictor import GaussianPredictor, Predictor, SampledPredictor
from curvlin_nn.predictive.request import Request
from curvlin_nn.predictive.response import Response
from curvlin_nn.predictive.weight_space import WeightSpace

__all__ = [
    "GaussianPredictor",
    "OutputGaussian",
    "PosteriorPredictive",
    "Prediction",
    "Predictive",
    "Predictor",
    "Request",
    "Response",
    "SampledPredictor",
    "WeightSpace",
    "check_link",
    "draw",
]
