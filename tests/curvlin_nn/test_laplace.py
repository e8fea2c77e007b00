"""Evidence, posterior and predictions of `Laplace` against the dense per-sample oracle."""

import itertools

import network_oracle as oracle
import pytest
import torch
from networks import Problem, problem
from torch import nn

from curvlin import BlockDiag, Dense, Diagonal, NotClosedError
from curvlin.gaussian import Gaussian
from curvlin_nn import Laplace, ParameterSpace, curvature, feature_maps
from curvlin_nn.errors import DataError, NotFittedError, StaleModelError, UnsupportedError

CASES = list(itertools.product(("mlp", "cnn"), ("classification", "regression"), ("full", "diag", "kron")))
PRIORS = {
    "scalar": lambda model: torch.tensor(0.7, dtype=torch.float64),
    "layerwise": lambda model: torch.linspace(0.2, 3.0, len(list(model.parameters())), dtype=torch.float64),
    "diag": lambda model: torch.linspace(0.1, 5.0, sum(p.numel() for p in model.parameters())).double(),
}


def expanded(prior: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """One precision per parameter."""
    sizes = torch.tensor([p.numel() for p in model.parameters()])
    if prior.ndim == 0:
        return prior.expand(int(sizes.sum()))
    return prior.repeat_interleave(sizes) if len(prior) == len(sizes) else prior


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def fitted(p: Problem, structure: str, **options) -> Laplace:
    la = Laplace(p.model, p.likelihood, options.pop("subset_of_weights", "all"), structure, **options)
    return la.fit(p.batches())


@pytest.mark.parametrize(("kind", "likelihood", "structure"), CASES)
@pytest.mark.parametrize("prior_structure", PRIORS)
def test_log_marginal_likelihood_equals_the_definition(kind, likelihood, structure, prior_structure):
    p = problem(kind, likelihood)
    prior = PRIORS[prior_structure](p.model)
    options = {
        "temperature": 0.6,
        "prior_mean": 0.1,
        "sigma_noise": 0.4 if likelihood == "regression" else 1.0,
    }
    la = fitted(p, structure, prior_precision=prior, **options)
    if (structure, prior_structure) == ("kron", "diag"):
        with pytest.raises(NotClosedError):
            la.log_marginal_likelihood()
        return
    H = oracle.curvature(p.model, p.x, p.y, likelihood, structure)
    expected = oracle.log_marginal_likelihood(
        p.model, p.x, p.y, likelihood, H, expanded(prior, p.model), options["sigma_noise"], 0.6, 0.1
    )
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("kind", "likelihood", "structure"), CASES)
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
def test_predictive_equals_the_oracle(kind, likelihood, structure, prior_structure):
    p = problem(kind, likelihood)
    prior = PRIORS[prior_structure](p.model)
    sigma = 0.4 if likelihood == "regression" else 1.0
    la = fitted(p, structure, prior_precision=prior, temperature=0.6, sigma_noise=sigma)
    H = oracle.curvature(p.model, p.x, p.y, likelihood, structure)
    precision = H / (0.6 * sigma**2) + torch.diag(expanded(prior, p.model))
    joint = oracle.covariance(p.model, p.x_test, precision)
    n, c = 5, 3
    covariance = torch.stack([joint.view(n, c, n, c)[i, :, i] for i in range(n)])
    variance = covariance.diagonal(dim1=1, dim2=2)
    mean = p.model(p.x_test).detach()
    tight = {"rtol": 1e-9, "atol": 1e-11}

    torch.testing.assert_close(la.posterior_precision.to_dense(), precision, **tight)
    if likelihood == "classification":
        torch.testing.assert_close(la(p.x_test), oracle.probit(mean, variance), **tight)
        return
    for options, expected in [
        ({}, (mean, covariance)),
        ({"diagonal_output": True}, (mean, variance)),
        ({"joint": True}, (mean.flatten(), joint)),
        ({"observation_noise": True}, (mean, covariance + 0.16 * eye(3))),
        ({"diagonal_output": True, "observation_noise": True}, (mean, variance + 0.16)),
        ({"joint": True, "observation_noise": True}, (mean.flatten(), joint + 0.16 * eye(15))),
    ]:
        torch.testing.assert_close(la(p.x_test, **options), expected, **tight)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_last_layer_posterior_equals_the_closed_form(structure):
    """On features phi the network is a linear model; nothing but phi, Lambda and the prior enters."""
    p = problem("mlp", "classification")
    la = Laplace(p.model, "classification", hessian_structure=structure, prior_precision=0.3).fit(p.batches())
    with torch.no_grad():
        features, test = p.model[:-1](p.x), p.model[:-1](p.x_test)
    head = Problem(p.model[-1], "classification", features, p.y, test)
    H = oracle.curvature(head.model, features, p.y, "classification", structure)
    precision = H + 0.3 * eye(len(H))
    joint = oracle.covariance(head.model, test, precision).view(5, 3, 5, 3)
    variance = torch.stack([joint[i, :, i].diagonal() for i in range(5)])
    assert la.parameters.names == ("4.weight", "4.bias")
    torch.testing.assert_close(
        la(p.x_test), oracle.probit(p.model(p.x_test).detach(), variance), rtol=1e-9, atol=0
    )
    expected = oracle.log_marginal_likelihood(
        head.model, features, p.y, "classification", H, torch.full((len(H),), 0.3, dtype=torch.float64)
    )
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)


def test_evidence_of_bayesian_linear_regression_is_exact():
    """For a linear model at its MAP the Laplace evidence is the marginal likelihood itself."""
    x, y = torch.randn(12, 3).double(), torch.randn(12, 1).double()
    design = torch.cat([x, torch.ones(12, 1).double()], dim=1)
    delta, sigma = 0.8, 0.5
    posterior = design.T @ design / sigma**2 + delta * eye(4)
    theta = torch.linalg.solve(posterior, design.T @ y / sigma**2).squeeze(1)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[None, :3])
        model.bias.copy_(theta[3:])
    la = Laplace(model, "regression", "all", "full", prior_precision=delta, sigma_noise=sigma)
    la.fit([(x, y)])
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(12).double(), design @ design.T / delta + sigma**2 * eye(12)
    )
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(marginal.log_prob(y.squeeze(1))), rel=1e-12
    )
    _, variance = la(x, observation_noise=True)
    expected = torch.einsum("ni,ij,nj->n", design, torch.linalg.inv(posterior), design) + sigma**2
    torch.testing.assert_close(variance.flatten(), expected, rtol=1e-12, atol=0)


def test_posterior_is_a_gaussian_in_the_flat_order():
    p = problem("cnn", "regression")
    la = fitted(p, "kron", prior_precision=0.5)
    q = la.posterior
    assert isinstance(q, Gaussian)
    space = ParameterSpace.of(p.model)
    assert torch.equal(la.mean, space.flatten(space.tensors(p.model)))
    theta = la.mean + 0.1 * torch.randn(la.n_params).double()
    expected = torch.distributions.MultivariateNormal(
        la.mean, precision_matrix=la.posterior_precision.to_dense()
    )
    torch.testing.assert_close(q.log_prob(theta), expected.log_prob(theta), rtol=1e-10, atol=0)
    assert (la.n_data, la.n_outputs, la.n_params) == (8, 3, space.size)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_the_posterior_follows_the_hyperparameters(structure):
    p = problem("mlp", "regression")
    la = fitted(p, structure)
    la(p.x_test)  # whatever is kept from the first posterior must not serve the second
    la.prior_precision, la.sigma_noise, la.prior_mean, la.temperature = 0.2, 0.3, 0.4, 0.5
    fresh = fitted(p, structure, prior_precision=0.2, sigma_noise=0.3, prior_mean=0.4, temperature=0.5)
    torch.testing.assert_close(la(p.x_test), fresh(p.x_test), rtol=0, atol=0)
    assert torch.equal(la.log_marginal_likelihood(), fresh.log_marginal_likelihood())
    delta = torch.tensor(7.0, dtype=torch.float64)
    la.prior_precision = delta
    la(p.x_test)
    delta.fill_(0.2)  # changed in place: still seen
    torch.testing.assert_close(la(p.x_test), fresh(p.x_test), rtol=0, atol=0)


def test_the_posterior_follows_a_new_fit():
    p = problem("mlp", "regression")
    la = fitted(p, "kron")
    la(p.x_test)
    la.fit([(p.x[:4], p.y[:4])])
    fresh = Laplace(p.model, p.likelihood, "all", "kron").fit([(p.x[:4], p.y[:4])])
    torch.testing.assert_close(la(p.x_test), fresh(p.x_test), rtol=0, atol=0)


def test_modulewise_prior_shares_a_precision_between_weight_and_bias():
    p = problem("mlp", "classification")
    modules, tensors = (
        torch.tensor([0.5, 1.0, 2.0]).double(),
        torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0]).double(),
    )
    la = fitted(p, "kron", prior_precision=modules)
    expected = fitted(p, "kron", prior_precision=tensors).log_marginal_likelihood()
    torch.testing.assert_close(la.log_marginal_likelihood(), expected, rtol=1e-13, atol=0)


def test_an_earlier_posterior_serves_as_prior():
    """For the full structure, two tasks in turn are both at once."""
    p = problem("mlp", "regression")
    first = Problem(p.model, p.likelihood, p.x[:5], p.y[:5], p.x_test)
    second = Problem(p.model, p.likelihood, p.x[5:], p.y[5:], p.x_test)
    la = fitted(first, "full", prior_precision=0.5, prior_mean=0.2)
    sequential = fitted(second, "full", prior_precision=la.posterior_precision)
    both = fitted(p, "full", prior_precision=0.5)
    torch.testing.assert_close(sequential(p.x_test), both(p.x_test), rtol=1e-10, atol=1e-13)
    H = oracle.curvature(p.model, p.x[5:], p.y[5:], "regression", "full")
    P0 = la.posterior_precision.to_dense()
    theta = la.mean
    expected = (
        torch.distributions.Normal(p.model(p.x[5:]), 1.0).log_prob(p.y[5:]).sum()
        - theta @ P0 @ theta / 2
        - (torch.logdet(P0 + H) - torch.logdet(P0)) / 2
    )
    torch.testing.assert_close(sequential.log_marginal_likelihood(), expected.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_fitting_in_parts_equals_fitting_at_once(structure):
    p = problem("cnn", "regression")
    la = Laplace(p.model, p.likelihood, "all", structure)
    la.fit([(p.x[:5], p.y[:5])]).fit([(p.x[5:], p.y[5:])], override=False)
    whole = fitted(p, structure)
    torch.testing.assert_close(la.curvature.to_dense(), whole.curvature.to_dense(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        la.log_marginal_likelihood(), whole.log_marginal_likelihood(), rtol=1e-12, atol=0
    )
    assert la.n_data == 8
    la.fit([(p.x[5:], p.y[5:])])  # override: the earlier data are forgotten
    assert la.n_data == 3


def test_default_is_last_layer_kron():
    p = problem("mlp", "classification")
    la = Laplace(p.model, "classification").fit(p.batches())
    assert la.parameters.names == ("4.weight", "4.bias")
    assert isinstance(la.posterior_precision, BlockDiag)


@pytest.mark.parametrize(("structure", "kind"), [("full", Dense), ("diag", Diagonal), ("kron", BlockDiag)])
def test_posterior_precision_keeps_the_structure(structure, kind):
    p = problem("mlp", "classification")
    la = fitted(p, structure, prior_precision=torch.linspace(0.5, 1, 6).double())
    assert type(la.posterior_precision) is kind
    assert la.posterior_precision is la.posterior_precision  # factored once


# -- float32 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_single_precision_models_get_single_precision_predictions(structure):
    p = problem("cnn", "regression")
    expected = fitted(p, structure, prior_precision=0.5)(p.x_test)
    single = Problem(p.model.float(), p.likelihood, p.x.float(), p.y.float(), p.x_test.float())
    mean, covariance = fitted(single, structure, prior_precision=0.5)(single.x_test)
    assert mean.dtype == covariance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariance.double(), expected[1], rtol=1e-4, atol=1e-5)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"likelihood": "nonsense"},
            UnsupportedError,
            "likelihood 'nonsense' is not supported; expected one of",
        ),
        (
            {"subset_of_weights": "subnetwork"},
            UnsupportedError,
            "'subnetwork' needs subnetwork_indices, found None",
        ),
        ({"subset_of_weights": ["nope"]}, UnsupportedError, "names 'nope', which is no parameter or module"),
        (
            {"hessian_structure": "ekfax"},
            UnsupportedError,
            "'ekfax' is not supported; expected one of 'block', 'diag', 'ekfac', 'full'",
        ),
        ({"curvature": "gn"}, UnsupportedError, "curvature='gn' is not supported; expected one of 'ggn'"),
        (
            {"feature_map": object()},
            UnsupportedError,
            "feature_map must be a curvlin_nn.feature_maps.FeatureMap",
        ),
        ({"prior_precision": 0.0}, ValueError, "prior_precision must be positive and finite, found 0.000e"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision must be positive and finite, found -1.000e"),
        (
            {"prior_precision": float("nan")},
            ValueError,
            "prior_precision must be positive and finite, found nan",
        ),
        (
            {"prior_precision": torch.ones(2, 2)},
            ValueError,
            r"one-dimensional floating tensor, found shape \(2, 2\)",
        ),
        ({"prior_mean": float("inf")}, ValueError, "prior_mean must be a number or a flat vector, finite"),
        ({"sigma_noise": 0.0}, ValueError, "sigma_noise must be positive and finite, found 0.0"),
        (
            {"sigma_noise": torch.ones(3), "likelihood": "classification"},
            UnsupportedError,
            r"sigma_noise must be one number for classification, found shape \(3,\)",
        ),
        (
            {"sigma_noise": 0.5, "likelihood": "classification"},
            ValueError,
            "must be 1 for classification, which has no",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, found 0.0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, found str '1'"),
        ({"temperature": None}, TypeError, "temperature must be a number or a tensor, found NoneType None"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must be one number, found shape \(2,\)"),
        (
            {"prior_precision": None},
            TypeError,
            "prior_precision must be a number or a tensor, found NoneType",
        ),
        ({"prior_precision": "a"}, TypeError, "prior_precision must be a number or a tensor, found str 'a'"),
        ({"prior_precision": [1.0, float("inf")]}, ValueError, "must be positive and finite, found inf"),
        ({"prior_precision": torch.tensor([3.0, -2.0])}, ValueError, "and finite, found -2.000e"),
        ({"prior_mean": "a"}, TypeError, "prior_mean must be a number or a tensor, found str 'a'"),
        ({"sigma_noise": None}, TypeError, "sigma_noise must be a number or a tensor, found NoneType"),
        ({"hessian_structure": 3}, UnsupportedError, "hessian_structure=3 is not supported; expected one of"),
        ({"likelihood": ["regression"]}, UnsupportedError, r"likelihood \['regression'\] is not supported"),
        ({"subset_of_weights": 3}, UnsupportedError, "subset_of_weights=3 is not supported; expected 'all'"),
        (
            {"prior_structure": "nonsense"},
            UnsupportedError,
            "prior_structure='nonsense' is not supported; expected one of 'scalar'",
        ),
    ],
)
def test_bad_options_are_refused_when_they_are_given(options, error, message):
    model = problem("mlp", "regression").model
    with pytest.raises(error, match=message) as caught:
        Laplace(model, options.pop("likelihood", "regression"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: model.forward, "model must be a torch.nn.Module, found method"),
        (lambda model: None, "model must be a torch.nn.Module, found NoneType"),
        (nn.DataParallel, "a module on one device, found DataParallel; give it model.module"),
        (
            torch.jit.script,
            "that runs in Python, found RecursiveScriptModule; give the module it was made from",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_model_is_refused(wrap, message, subset):
    p = problem("mlp", "classification")
    model = wrap(p.model)
    for attempt in (
        lambda: Laplace(model, "classification", subset),
        lambda: curvature(model, "classification", p.batches(), subset_of_weights=subset),
        lambda: ParameterSpace.of(model),
        lambda: feature_maps.LastLayerMap(model)(p.x),
    ):
        with pytest.raises(UnsupportedError, match=message):
            attempt()


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    with pytest.raises(UnsupportedError, match=r"parameter 'weight' was made in torch.inference_mode"):
        Laplace(model, "classification")


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_inputs_of_another_dtype_or_without_samples_are_refused_in_fit_and_prediction(subset):
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", subset).fit(p.batches())
    uses = {
        "batch 0": lambda x: Laplace(p.model, "regression", subset).fit([(x, p.y[: len(x)])]),
        "the input": la,
    }
    for where, use in uses.items():
        with pytest.raises(DataError, match=f"{where} has dtype torch.float32 and the model torch.float64"):
            use(p.x.float())
        with pytest.raises(DataError, match=f"{where} must hold at least one sample, found shape"):
            use(p.x[:0])


def test_autocast_is_refused_in_fit_and_prediction():
    p = problem("mlp", "regression")
    la = fitted(p, "kron")
    for use in (lambda: la(p.x_test), lambda: fitted(p, "kron")):
        with pytest.raises(UnsupportedError, match="autocast is on"), torch.autocast("cpu"):
            use()


@pytest.mark.parametrize("link", ["nonsense", "mc", "bridge"])
def test_regression_has_no_link_to_approximate(link):
    p = problem("mlp", "regression")
    message = f"link_approx='{link}' is not supported for regression; expected one of 'probit'"
    with pytest.raises(UnsupportedError, match=message):
        fitted(p, "kron")(p.x_test, link_approx=link)


@pytest.mark.parametrize(
    ("n_samples", "error", "message"),
    [
        (0, ValueError, "n_samples must be a positive integer, found 0"),
        (-3, ValueError, "n_samples must be a positive integer, found -3"),
        (2.5, TypeError, "n_samples must be an integer, found float 2.5"),
        ("5", TypeError, "n_samples must be an integer, found str '5'"),
    ],
)
def test_draws_are_counted_from_one(n_samples, error, message):
    p = problem("mlp", "classification")
    la = fitted(p, "kron")
    for use in (
        lambda: la(p.x_test, link_approx="mc", n_samples=n_samples),
        lambda: la.functional_samples(p.x_test, n_samples),
        lambda: la.predictive_samples(p.x_test, n_samples),
        lambda: la.sample(n_samples),
    ):
        with pytest.raises(error, match=message):
            use()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda la, x: la(x, pred_type="map"),
            "pred_type='map' is not supported; expected one of 'glm', 'nn', 'gp'",
        ),
        (
            lambda la, x: la(x, link_approx="exact"),
            "link_approx='exact' is not supported for classification; expected one of 'probit', 'mean_field', 'bridge'",
        ),
        (
            lambda la, x: la(x, joint=True),
            "joint is not supported for classification; use functional_samples",
        ),
        (lambda la, x: la(x, observation_noise=True), "observation_noise needs a likelihood with noise"),
        (
            lambda la, x: la(x, joint=True, diagonal_output=True),
            "joint and diagonal_output exclude each other",
        ),
        (
            lambda la, x: la.predictive_samples(x, observation_noise=True),
            "observation_noise needs a likelihood with",
        ),
        (
            lambda la, x: la.optimize_prior_precision("bayes"),
            "method='bayes' is not supported; expected one of 'marglik', 'bound', 'gridsearch', 'brent', 'cv'",
        ),
        (
            lambda la, x: la.optimize_prior_precision(optimize_noise=True),
            "optimize_noise needs a likelihood with noise",
        ),
        (
            lambda la, x: la.optimize_prior_precision(prior_structure="x"),
            "prior_structure='x' is not supported; expected",
        ),
    ],
)
def test_requests_that_are_not_served_name_what_is(call, message):
    p = problem("mlp", "classification")
    la = fitted(p, "kron")
    with pytest.raises(UnsupportedError, match=message):
        call(la, p.x_test)


@pytest.mark.parametrize(
    "use",
    [
        lambda la, x: la(x),
        lambda la, x: la.log_marginal_likelihood(),
        lambda la, x: la.optimize_prior_precision(),
        lambda la, x: la.sample(2),
        lambda la, x: la.functional_samples(x),
        lambda la, x: la.posterior,
        lambda la, x: la.mean,
        lambda la, x: la.n_params,
    ],
)
def test_nothing_is_answered_before_fit(use):
    p = problem("mlp", "classification")
    with pytest.raises(NotFittedError, match=r"not fitted; call fit\(train_loader\) first"):
        use(Laplace(p.model, "classification"), p.x_test)


@pytest.mark.parametrize("length", [2, 5, 31])
def test_a_prior_of_the_wrong_length_is_refused_and_changes_nothing(length):
    p = problem("mlp", "classification")
    la = fitted(p, "kron", prior_precision=0.5)
    before = la.log_marginal_likelihood()
    for attempt in (
        lambda: setattr(la, "prior_precision", torch.ones(length)),
        lambda: la.log_marginal_likelihood(torch.ones(length)),
    ):
        with pytest.raises(
            ValueError, match=r"prior_precision must have 1, 6 \(per parameter tensor\), 3 \(per module"
        ):
            attempt()
    with pytest.raises(ValueError, match=f"prior_mean must have {la.n_params} entries, found {length}"):
        la.prior_mean = torch.zeros(length)
    assert torch.equal(la.log_marginal_likelihood(), before)


def test_an_ambiguous_prior_length_must_be_named():
    """Two parameters in all, one per tensor, each in a module of its own that owns nothing else."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=True)

        def forward(self, x):
            return self.b(self.a(x))

    model = Scales().double()  # tensors: 1 + 2 + 2 entries; modules: 2
    data = [(torch.randn(4, 1).double(), torch.randn(4, 2).double())]
    la = Laplace(model, "regression", lambda name, p: name != "a.weight", "full").fit(data)
    assert la.n_params == 4  # b.weight (2), b.bias (2): no length but 2 (tensors) and 4 (parameters) fits
    la.prior_precision = torch.tensor([1.0, 2.0])
    four = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1, bias=False), nn.Linear(1, 1)).double()
    la = Laplace(four, "regression", ["0.weight", "2", "3"], "full").fit([(data[0][0], data[0][1][:, :1])])
    la.prior_precision = torch.ones(
        4
    )  # four tensors of one entry: per tensor and per parameter mean the same


def normalised() -> nn.Module:
    """In training mode, with a buffer that outputs depend on and a layer outside of the last one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().train()
    model[1].running_mean.normal_()
    return model


def swap(tensor: torch.Tensor) -> None:
    tensor[0, 0], tensor[2, 1] = tensor[2, 1].clone(), tensor[0, 0].clone()


CHANGES = {
    "0.weight": {
        "in place": lambda model: model[0].weight.mul_(3),
        "through .data": lambda model: model[0].weight.data.mul_(3),
        "exchange": lambda model: swap(model[0].weight.data),
        "replaced": lambda model: setattr(model[0].weight, "data", torch.zeros(4, 3).double()),
    },
    "1.running_mean": {
        "buffer": lambda model: model[1].running_mean.add_(1e-9),
        "training": lambda model: model(torch.randn(8, 3).double()),
    },
    "3.bias": {"chosen": lambda model: model[3].bias[1].add_(1e-9)},
}


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(("name", "how"), [(name, how) for name in CHANGES for how in CHANGES[name]])
def test_a_model_that_changed_since_fit_is_refused(name, how, subset):
    model = normalised()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    chosen = ["0", "3"] if subset == "all" else subset
    la = Laplace(model, "classification", chosen).fit([(x, y)])
    held = {key: value.clone() for key, value in model.state_dict().items()}
    before = la(x)
    with torch.no_grad():
        CHANGES[name][how](model)
    for use in (la, la.functional_samples, la.predictive_samples, lambda x: la.fit([(x, y)], override=False)):
        with pytest.raises(StaleModelError, match=f"'{name}' of the model changed since fit; call fit again"):
            use(x)
    model.load_state_dict(held)
    assert torch.equal(la(x), before)
    la.fit([(x, y)], override=False)
    assert la.n_data == 16


def test_a_model_that_changed_its_dtype_or_its_tensors_since_fit_is_refused():
    model = normalised()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    la = Laplace(model, "classification").fit([(x, y)])
    model.float()
    with pytest.raises(StaleModelError, match=r"'0\.bias' of the model changed since fit"):
        la(x)
    model = normalised()
    la = Laplace(model, "classification").fit([(x, y)])
    model.register_buffer("added", torch.zeros(0))
    with pytest.raises(StaleModelError, match="'added' of the model changed since fit"):
        la(x)


def test_a_model_that_trained_on_is_fitted_anew_on_request():
    model = normalised()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    la = Laplace(model, "classification").fit([(x, y)])
    model(x)
    la.fit([(x, y)])
    expected = Laplace(model, "classification").fit([(x, y)])(x)
    torch.testing.assert_close(la(x), expected, rtol=0, atol=0)
