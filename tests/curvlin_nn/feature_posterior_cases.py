"""Posteriors on features, with options that all count, shared by the tests."""

from __future__ import annotations

import itertools

from networks import Problem

from curvlin_nn import Laplace
from curvlin_nn.feature_maps import FeatureMap

CASES = list(itertools.product(("mlp", "cnn"), ("classification", "regression")))
DELTA, TEMPERATURE = 0.7, 0.6


def sigma_of(p: Problem) -> float:
    return 0.4 if p.likelihood == "regression" else 1.0


def fitted(p: Problem, feature_map: FeatureMap | None = None, **options) -> Laplace:
    options = {
        "prior_precision": DELTA,
        "temperature": TEMPERATURE,
        "sigma_noise": sigma_of(p),
        "prior_mean": 0.1,
    } | options
    choice = ("all", "full") if feature_map is None else ()
    return Laplace(p.model, p.likelihood, *choice, feature_map=feature_map, **options).fit(p.batches())
