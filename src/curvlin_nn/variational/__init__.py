"""Variational posteriors: Gaussians over functions that are trained on a bound of the evidence, batch by batch.

valla                the sparse posterior of the linearised network
bound                what it is trained on
inducing             its inducing points
dual                 a sparse Gaussian process around a known mean
expected_likelihood  the likelihood's expectation for Gaussian outputs
fitted               what a fit leaves
stored               that in a file
training             steps over batches, held-out scores, and the best state
"""

from curvlin_nn.variational.inducing import InducingPoints
from curvlin_nn.variational.training import TrainingHistory
from curvlin_nn.variational.valla import VaLLA

__all__ = ["InducingPoints", "TrainingHistory", "VaLLA"]
