"""The names that code written for laplace-torch 0.3 uses, listed by hand: they exist, and mean the same.

What is different on purpose is said on the page "Coming from laplace-torch".
"""

from __future__ import annotations

import inspect
import re
from enum import Enum
from pathlib import Path

import pytest
import torch
from networks import problem

import curvlin
import curvlin_nn
from curvlin_nn import Laplace
from curvlin_nn.errors import UnsupportedError

REQUIRED = inspect.Parameter.empty
PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
DEFECTS = Path(__file__).with_name("test_laplace_torch_defects.py").read_text()

CURVLIN = [
    "PrecisionOperator",
    "Isotropic",
    "Diagonal",
    "Dense",
    "KroneckerSum",
    "SpectralKronecker",
    "BlockDiag",
    "LowRankPlusDiag",
    "Woodbury",
    "Covariance",
    "IterativePrecision",
    "FeatureOperator",
    "DenseFeatures",
    "KhatriRaoFeatures",
    "BlockFeatures",
    "Gaussian",
    "NotPositiveDefiniteError",
    "NotClosedError",
]
CURVLIN_NN = [
    "Laplace",
    "curvature",
    "marglik_training",
    "likelihoods",
    "structures",
    "feature_maps",
    "metrics",
]

ENUMS = {
    "SubsetOfWeights": ["all", "last_layer", "subnetwork"],
    "HessianStructure": ["full", "kron", "diag", "lowrank", "gp"],
    "Likelihood": ["regression", "classification", "reward_modeling"],
    "FeatureReduction": ["pick_first", "pick_last", "average"],
    "PredType": ["glm", "nn", "gp"],
    "LinkApprox": ["mc", "probit", "bridge", "bridge_norm"],
    "TuningMethod": ["marglik", "gridsearch"],
    "PriorStructure": ["scalar", "diag", "layerwise"],
}

MASKS = {
    "RandomSubnetMask": ["model", "n_params_subnet"],
    "LargestMagnitudeSubnetMask": ["model", "n_params_subnet"],
    "LargestVarianceDiagLaplaceSubnetMask": ["model", "n_params_subnet", "diag_laplace_model"],
    "LargestVarianceSWAGSubnetMask": [
        *("model", "n_params_subnet", "likelihood", "swag_n_snapshots", "swag_snapshot_freq", "swag_lr")
    ],
    "ParamNameSubnetMask": ["model", "parameter_names"],
    "ModuleNameSubnetMask": ["model", "module_names"],
    "LastLayerSubnetMask": ["model", "last_layer_name"],
}

CONSTRUCTOR = {
    "model": REQUIRED,
    "likelihood": REQUIRED,
    "subset_of_weights": None,
    "hessian_structure": None,
    "curvature": "ggn",
    "sigma_noise": 1.0,
    "prior_precision": 1.0,
    "prior_mean": 0.0,
    "temperature": 1.0,
    "feature_map": None,
    "enable_backprop": False,
    "dict_key_y": "labels",
    "last_layer_name": None,
    "feature_reduction": None,
    "subnetwork_indices": None,
}

METHODS = {
    "fit": {"train_loader": REQUIRED, "override": True, "progress_bar": False},
    "__call__": {
        "x": REQUIRED,
        "pred_type": "glm",
        "link_approx": "probit",
        "joint": False,
        "diagonal_output": False,
        "n_samples": 100,
        "generator": None,
        "observation_noise": False,
    },
    "predict": {"x": REQUIRED},
    "log_marginal_likelihood": {"prior_precision": None, "sigma_noise": None},
    "optimize_prior_precision": {
        "method": "marglik",
        "prior_structure": "scalar",
        "optimize_noise": False,
        "pred_type": "glm",
        "link_approx": "probit",
        "n_samples": 100,
        "val_loader": None,
        "loss": None,
        "log_prior_prec_min": -4,
        "log_prior_prec_max": 4,
        "log_prior_prec_base": 10.0,
        "grid_size": 100,
        "progress_bar": False,
    },
    "functional_samples": {"x": REQUIRED, "n_samples": 100, "generator": None},
    "predictive_samples": {"x": REQUIRED, "n_samples": 100, "generator": None},
    "sample": {"n_samples": 100, "generator": None},
    "functional_variance": {"Js": REQUIRED},
    "functional_covariance": {"Js": REQUIRED},
    "log_prob": {"value": REQUIRED, "normalized": True},
    "square_norm": {"value": REQUIRED},
    "state_dict": {},
    "load_state_dict": {},
    "save": {"path": REQUIRED},
    "load": {"path": REQUIRED, "model": REQUIRED, "likelihood": None, "feature_map": None},
}

SETTABLE = ["prior_precision", "prior_mean", "sigma_noise", "temperature"]
PROPERTIES = [
    "log_likelihood",
    "scatter",
    "log_det_ratio",
    "log_det_prior_precision",
    "log_det_posterior_precision",
    "mean",
    "n_params",
    "n_data",
    "n_outputs",
    "posterior",
    "posterior_precision",
    "posterior_covariance",
    "posterior_variance",
    "posterior_scale",
    "prior_precision_diag",
]

ONLINE = {
    "model": REQUIRED,
    "train_loader": REQUIRED,
    "likelihood": "classification",
    "hessian_structure": "kron",
    "optimizer_cls": torch.optim.Adam,
    "optimizer_kwargs": None,
    "scheduler_cls": None,
    "scheduler_kwargs": None,
    "n_epochs": 300,
    "lr_hyp": 0.1,
    "prior_structure": "layerwise",
    "n_epochs_burnin": 0,
    "n_hypersteps": 10,
    "marglik_frequency": 1,
    "prior_prec_init": 1.0,
    "sigma_noise_init": 1.0,
    "temperature": 1.0,
    "fix_sigma_noise": False,
    "progress_bar": False,
}


def assert_takes(function, arguments: dict[str, object]) -> None:
    """By these names, with these defaults, the required ones by position in this order."""
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in arguments if name in parameters} == arguments
    required = [name for name, default in arguments.items() if default is REQUIRED]
    assert [name for name in parameters if name != "self"][: len(required)] == required


@pytest.mark.parametrize("name", CURVLIN)
def test_names_of_curvlin(name):
    assert name in curvlin.__all__
    assert hasattr(curvlin, name)


@pytest.mark.parametrize("name", CURVLIN_NN)
def test_names_of_curvlin_nn(name):
    assert name in curvlin_nn.__all__
    assert hasattr(curvlin_nn, name)


@pytest.mark.parametrize("name", ENUMS)
def test_enumerations_are_of_strings(name):
    enumeration = getattr(curvlin_nn, name)
    assert issubclass(enumeration, Enum)
    for value in ENUMS[name]:
        member = getattr(enumeration, value.upper())
        assert member == value
        assert enumeration(value) is member
        assert f"{member} {member!s} {member!r} {member:>12}" == f"{value} {value} {value!r} {value:>12}"
        assert {value: 1}[member] == 1


def test_the_constructor():
    assert_takes(Laplace, CONSTRUCTOR)
    assert list(inspect.signature(Laplace).parameters)[:4] == list(CONSTRUCTOR)[:4]


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    assert_takes(getattr(Laplace, name), METHODS[name])


@pytest.mark.parametrize("name", [*SETTABLE, *PROPERTIES])
def test_properties(name):
    assert isinstance(getattr(Laplace, name), property)
    assert (getattr(Laplace, name).fset is not None) == (name in SETTABLE)


def test_online_training():
    assert_takes(curvlin_nn.marglik_training, ONLINE)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask = getattr(curvlin_nn.subnetwork, name)
    assert list(inspect.signature(mask).parameters)[: len(MASKS[name])] == MASKS[name]
    assert_takes(mask.select, {"train_loader": None})
    assert {"indices", "n_params_subnet", "convert_subnet_mask_to_indices"} <= set(dir(mask))


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_names_every_argument_and_property():
    only_ours = {"curvature", "feature_map", "posterior"}
    names = {*CONSTRUCTOR, *METHODS, *PROPERTIES} - only_ours - {"__call__", "predict", "save", "load"}
    assert {name for name in names if not re.search(rf"`(la\.)?{name}\b", PAGE)} == set()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", PAGE))))
def test_the_page_names_tests_that_exist(name):
    assert f"def {name}(" in DEFECTS


def test_the_page_names_every_test_of_a_defect():
    found = set(re.findall(r"^def (test_\w+)\(", DEFECTS, re.M))
    assert found == set(re.findall(r"`(test_\w+)`", PAGE))


# -- enumerations wherever strings are ----------------------------------------------------------------------


def test_enumerations_are_taken_wherever_their_strings_are():
    p = problem("mlp", "classification")
    by_name = Laplace(p.model, "classification", "all", "kron").fit(p.batches())
    by_member = Laplace(
        p.model,
        curvlin_nn.Likelihood.CLASSIFICATION,
        curvlin_nn.SubsetOfWeights.ALL,
        curvlin_nn.HessianStructure.KRON,
        prior_structure=curvlin_nn.PriorStructure.SCALAR,
    ).fit(p.batches())
    for link in curvlin_nn.LinkApprox:
        options = {"n_samples": 4, "pred_type": curvlin_nn.PredType.GLM, "link_approx": link}
        found = by_member(p.x_test, generator=torch.Generator().manual_seed(0), **options)
        options = {"n_samples": 4, "pred_type": "glm", "link_approx": link.value}
        assert torch.equal(found, by_name(p.x_test, generator=torch.Generator().manual_seed(0), **options))
    optima = [
        la.optimize_prior_precision(method, prior_structure)
        for la, method, prior_structure in [
            (by_member, curvlin_nn.TuningMethod.MARGLIK, curvlin_nn.PriorStructure.LAYERWISE),
            (by_name, "marglik", "layerwise"),
        ]
    ]
    assert torch.equal(optima[0].prior_precision, optima[1].prior_precision)
    assert torch.equal(by_member(p.x_test), by_name(p.x_test))


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": object},
            UnsupportedError,
            "^backend= is not supported: .*curvature='ggn', .*'ef' or 'hessian'$",
        ),
        ({"backend_kwargs": {}}, UnsupportedError, "^backend_kwargs= is not supported: .* leave it out"),
        (
            {"asdl_fisher_kwargs": {}},
            UnsupportedError,
            "^asdl_fisher_kwargs= is not supported: .* leave it out",
        ),
        ({"dict_key_x": "x"}, UnsupportedError, "^dict_key_x= is not supported: .*leave it out.*dict_key_y$"),
        (
            {"functional_approximation": "sod"},
            UnsupportedError,
            "^functional_approximation= is not supported: ",
        ),
        ({"sigma": 1.0}, TypeError, "^unexpected keyword argument 'sigma'; did you mean 'sigma_noise'"),
        (
            {"zzz": 1.0},
            TypeError,
            "^unexpected keyword argument 'zzz'; expected one of 'model', 'likelihood', ",
        ),
    ],
)
def test_arguments_without_a_meaning_are_refused_with_what_to_write_instead(options, error, message):
    p = problem("mlp", "classification")
    with pytest.raises(error, match=message) as caught:
        Laplace(p.model, "classification", "all", "diag", **options)
    assert "\n" not in str(caught.value)
    assert "unknown" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_steps": 10}, UnsupportedError, "^n_steps= is not supported: leave it out, the search ends"),
        ({"lr": 0.1}, UnsupportedError, "^lr= is not supported: leave it out, the search ends"),
        (
            {"init_prior_prec": 1.0},
            UnsupportedError,
            "^init_prior_prec= is not supported: .* starts at prior_",
        ),
        ({"verbose": True}, UnsupportedError, "^verbose= is not supported: the optimum is returned"),
        ({"max_step": 3}, TypeError, "^unexpected keyword argument 'max_step'; did you mean 'max_steps'"),
    ],
)
def test_a_search_refuses_what_it_does_not_need(options, error, message):
    p = problem("mlp", "classification")
    la = Laplace(p.model, "classification", "all", "diag").fit(p.batches())
    with pytest.raises(error, match=message):
        la.optimize_prior_precision(**options)
    assert float(la.prior_precision) == 1


def test_the_third_argument_of_a_prediction_is_a_link_and_not_a_flag():
    """It is `joint` in laplace-torch: a call by position is refused and not taken for something else."""
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "all", "diag").fit(p.batches())
    with pytest.raises(UnsupportedError, match="link_approx=True is not supported"):
        la(p.x_test, "glm", True)
