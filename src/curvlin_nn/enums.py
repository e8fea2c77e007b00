"""The names of options as enumerations: each member is the string that stands for it, and is taken wherever that is.

They are there for completion in an editor, and for code that was written for laplace-torch. What is served is said by
the registries (`curvlin_nn.likelihoods.available`, `curvlin_nn.structures.available`), which other packages extend.
"""

from __future__ import annotations

from enum import Enum

__all__ = [
    "FeatureReduction",
    "HessianStructure",
    "Likelihood",
    "LinkApprox",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
]


class _Name(str, Enum):
    """A string with a name; it prints as the string."""

    def __str__(self) -> str:
        return self.value

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, format_spec: str) -> str:
        return format(self.value, format_spec)


class SubsetOfWeights(_Name):
    """Which parameters a posterior is about."""

    ALL = "all"
    LAST_LAYER = "last_layer"
    SUBNETWORK = "subnetwork"


class HessianStructure(_Name):
    """The structure that the curvature is kept in."""

    FULL = "full"
    KRON = "kron"
    DIAG = "diag"
    LOWRANK = "lowrank"
    GP = "gp"
    EKFAC = "ekfac"
    KFOC = "kfoc"
    KRON_LOWRANK = "kron-lowrank"
    BLOCK = "block"


class Likelihood(_Name):
    """The names of likelihoods; `curvlin_nn.likelihoods.Likelihood` is the base class of all of them."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    REWARD_MODELING = "reward_modeling"
    BINARY = "binary"
    POISSON = "poisson"
    HETEROSCEDASTIC = "heteroscedastic"


class FeatureReduction(_Name):
    """What a model does with the outputs of its last layer at several positions."""

    PICK_FIRST = "pick_first"
    PICK_LAST = "pick_last"
    AVERAGE = "average"


class PredType(_Name):
    """What a prediction is made of: the linearised network, draws of the weights, or the function-space dual."""

    GLM = "glm"
    NN = "nn"
    GP = "gp"


class LinkApprox(_Name):
    """How the expectation of a link is approximated."""

    MC = "mc"
    PROBIT = "probit"
    BRIDGE = "bridge"
    BRIDGE_NORM = "bridge_norm"


class TuningMethod(_Name):
    """How the prior precision is chosen."""

    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"


class PriorStructure(_Name):
    """Which parameters share a prior precision."""

    SCALAR = "scalar"
    DIAG = "diag"
    LAYERWISE = "layerwise"
    MODULEWISE = "modulewise"
