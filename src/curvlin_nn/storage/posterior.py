"""What a `Laplace` object is made of, as tensors and plain values; the model itself is not part of it.

A posterior is valid around the parameters that it was fitted to, and predictions run through all others and through
buffers, so that names, shapes, dtypes and checksums of the values of all are stored, and asked of the model that it is
loaded for. The sums over the data are stored, not what is made of them: a fit goes on from them.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from curvlin_nn.capture.state import device_of
from curvlin_nn.curvature import Accumulated
from curvlin_nn.errors import StorageError
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.fingerprint import check_same
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.storage import options, plain
from curvlin_nn.storage.files import VERSION
from curvlin_nn.structures import StructureChoice
from curvlin_nn.subnetwork_space import Subnetwork

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace

KIND = "curvlin_nn.Laplace"
"""What a file of this kind says that it is."""

_SUBSET = ("subset_of_weights", "subnetwork_indices", "last_layer_name", "feature_reduction")

CHOICES = ("likelihood", *_SUBSET, "hessian_structure", "curvature", "indefinite", "feature_map")
"""The arguments of the constructor that decide what is summed over the data."""

_HYPERPARAMETERS = ("prior_mean", "sigma_noise", "temperature")

_SETTINGS = ("damping", "prior_projection", "enable_backprop", "n_subset", "dict_key_y")


def choices_of(la: Laplace) -> dict[str, Any]:
    """What is summed over the data, by the names of the arguments; a predicate by the parameters that it chooses."""
    subset: Selection | list[str] = la.subset_of_weights
    if callable(subset):
        subset = list(ParameterSpace.of(la.model, subset).names)
    return {
        "likelihood": options.of_likelihood(la.likelihood),
        "subset_of_weights": subset if isinstance(subset, str) else list(subset),
        "subnetwork_indices": la.subnetwork_indices,
        "last_layer_name": la.last_layer_name,
        "feature_reduction": la.feature_reduction,
        "curvature": la._choice.name,
        **la._choice.described(),
        "feature_map": None if la._features is None else la._features.description(),
    }


def summed_choices_of(la: Laplace) -> dict[str, Any]:
    """Those of the choices that a fit cannot go on without: `indefinite` is about what is made of the sums."""
    return {name: choice for name, choice in choices_of(la).items() if name != "indefinite"}


def state_of(la: Laplace) -> dict[str, Any]:
    """See `Laplace.state_dict`."""
    fit = la._fit
    return {
        "version": VERSION,
        **choices_of(la),
        "generator": options.of_generator(la._choice.columns.generator),
        "prior_precision": options.of_prior(la.prior_precision),
        "prior_structure": la._prior_structure,
        "prior_mean": la.prior_mean.detach(),
        "sigma_noise": la.sigma_noise.detach(),
        "temperature": la.temperature,
        "damping": la._choice.damping,
        "prior_projection": la._prior_projection,
        "enable_backprop": la.enable_backprop,
        "n_subset": la.n_subset,
        "dict_key_y": la.dict_key_y,
        "model": fit.fingerprint.state_dict(),
        "sums": fit.accumulated.state_dict(),
        "n_noise_scales": fit.curvature.n_noise_scales,
        "left_out": fit.left_out,
    }


def arguments(
    state: dict[str, Any],
    likelihood: str | nn.Module | Likelihood | None,
    hessian_structure: StructureChoice | None,
    feature_map: FeatureMap | None,
) -> dict[str, Any]:
    """What the constructor takes to make an object that a state fits, some of it given again.

    Raises:
        StorageError: if something must be given that is not, or no generator can be made on this machine.
    """
    structure = state["hessian_structure"]
    of_map = state.get("feature_map")
    if of_map is not None and feature_map is None:
        raise StorageError(
            f"feature_map was a {of_map['kind']}, which no file holds; give it again with "
            "Laplace.load(..., feature_map=...)"
        )
    return {
        "likelihood": options.to_likelihood(state["likelihood"], likelihood),
        **{name: state[name] for name in _SUBSET},
        "hessian_structure": structure
        if isinstance(structure, str)
        else options.to_structure(structure, hessian_structure),
        "curvature": state["curvature"],
        "indefinite": state["indefinite"],
        "generator": options.to_generator(state["generator"]),
        "feature_map": feature_map,
        "residual": of_map is None or of_map["residual"],
        **{name: state[name] for name in _SETTINGS},
    }


def take_up(la: Laplace, state: dict[str, Any]) -> None:
    """See `Laplace.load_state_dict`."""
    _check(la, state)
    check_same(state["model"], la.model)
    selection, states = la._choice.selection, la._choice.empty_states(state["n_noise_scales"])
    subset = selection if isinstance(selection, (Subnetwork, FeatureMap)) else None
    found = Accumulated.of(state["sums"], la.model, states, subset, la.feature_reduction)
    changed = copy.copy(la)
    changed._fitted = None
    changed._choice = replace(la._choice, damping=state["damping"])
    changed._prior_projection = state["prior_projection"]
    changed.enable_backprop, changed.n_subset = state["enable_backprop"], state["n_subset"]
    changed.dict_key_y = state["dict_key_y"]
    changed._prior_structure = state["prior_structure"]
    precision = plain.with_tensors(torch.clone, state["prior_precision"])
    changed.prior_precision = options.to_prior(precision, device_of(la.model))
    for name in _HYPERPARAMETERS:
        setattr(changed, name, plain.with_tensors(torch.clone, state[name]))
    changed._finish(found, time.perf_counter())
    left_out = plain.with_tensors(lambda t: t.to(device_of(la.model), copy=True), state.get("left_out"))
    changed._fitted = replace(changed._fit, left_out=left_out)  # files of earlier versions have none
    vars(la).update(vars(changed))


def _check(la: Laplace, state: dict[str, Any]) -> None:
    expected = {"version", "model", "sums", "n_noise_scales", "prior_precision", "prior_structure"}
    expected |= {*CHOICES, *_HYPERPARAMETERS, *_SETTINGS}
    if missing := sorted(expected - set(state if isinstance(state, dict) else ())):
        raise StorageError(
            f"state has no {missing[0]!r}, expected what Laplace.state_dict returns; give that"
        )
    if state["version"] > VERSION:
        raise StorageError(
            f"state is of version {state['version']}, expected at most {VERSION}; upgrade curvlin"
        )
    for name, choice in options.without_randomness(choices_of(la)).items():
        if not plain.equal(choice, options.without_randomness(state[name])):
            raise StorageError(
                f"state is that of an object with another {name}; make this one with the same, or use Laplace.load"
            )
