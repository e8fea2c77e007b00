"""What a `VaLLA` object is made of, as tensors and plain values; the model itself is not part of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from curvlin_nn.capture import Recorder
from curvlin_nn.capture.inputs import map_tensors
from curvlin_nn.capture.state import device_of
from curvlin_nn.fingerprint import Fingerprint, check_same
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.storage import options
from curvlin_nn.variational.bound import Sparse
from curvlin_nn.variational.fitted import Fitted
from curvlin_nn.variational.inducing import InducingPoints
from curvlin_nn.variational.training import TrainingHistory

if TYPE_CHECKING:
    from curvlin_nn.variational.valla import VaLLA

KIND = "curvlin_nn.VaLLA"
"""What a file of this kind says that it is."""


def state_of(va: VaLLA) -> dict[str, Any]:
    """All that predictions are made of."""
    fit = va._fit
    return {
        "likelihood": options.of_likelihood(va.likelihood),
        "parameters": list(fit.recorder.space.names),
        "dict_key_y": va.dict_key_y,
        "inputs": fit.points.inputs,
        "outputs": fit.points.outputs,
        "root": fit.sparse.root,
        "prior_precision": fit.sparse.prior_precision,
        "sigma_noise": fit.sparse.sigma_noise,
        "history": asdict(fit.history),
        "n_data": fit.n_data,
        "model": fit.fingerprint.state_dict(),
    }


def arguments(state: dict[str, Any], likelihood: str | nn.Module | Likelihood | None) -> dict[str, Any]:
    """What the constructor takes to make an object that a state fits.

    Raises:
        StorageError: if the likelihood must be given and is not.
    """
    return {
        "likelihood": options.to_likelihood(state["likelihood"], likelihood),
        "inducing": (state["inputs"], state["outputs"]),
        "subset_of_weights": state["parameters"],
        "prior_precision": state["prior_precision"],
        "sigma_noise": state["sigma_noise"],
        "dict_key_y": state["dict_key_y"],
    }


def fitted(state: dict[str, Any], model: nn.Module) -> Fitted:
    """What a fit left, around the same model.

    Raises:
        StaleModelError: if the model is another one, or holds other values.
    """
    check_same(state["model"], model)
    device = device_of(model)
    inputs = map_tensors(lambda t: t.to(device), state["inputs"])
    points = InducingPoints(inputs, state["outputs"].to(device))
    recorder = Recorder(model, ParameterSpace.of(model, state["parameters"]))
    numbers = (state[name].to(device) for name in ("root", "prior_precision", "sigma_noise"))
    sparse = Sparse(points.rows(recorder), *numbers)
    history = TrainingHistory(**state["history"])
    return Fitted(sparse, points, recorder, Fingerprint.of(model), history, state["n_data"])
