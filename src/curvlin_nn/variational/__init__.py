"""Variational posteriors: Gaussians over functions that are trained on a bound of the evidence, batch by batch.

posterior            what the variational posteriors have in common
valla                the sparse posterior of the linearised network
bound                what it is trained on
fmgp                 a sparse Gaussian process of any kernel around the network
kernels, points      its kernels, and what they see of a sample
fixed_mean_gp        what it learns
fixed_mean_objective what it is trained on
fixed_mean           its Gaussian over outputs
inducing             inducing points
dual                 a sparse Gaussian process around a known mean
expected_likelihood  the likelihood's expectation for Gaussian outputs
fitted               what a fit leaves
stored               that in a file
training             steps over batches, held-out scores, and the best state
"""

from curvlin_nn.variational.fmgp import FMGP
from curvlin_nn.variational.inducing import InducingPoints
from curvlin_nn.variational.training import TrainingHistory
from curvlin_nn.variational.valla import VaLLA

__all__ = ["FMGP", "InducingPoints", "TrainingHistory", "VaLLA"]
