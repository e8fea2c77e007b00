"""The bound of the evidence from a few features, against dense matrices and the evidence of the full GGN."""

import math

import network_oracle as oracle
import pytest
import torch
from feature_posterior_cases import CASES, DELTA, TEMPERATURE, fitted, sigma_of
from networks import Problem, Sequences, assert_same, problem, state
from torch import nn

from curvlin import DenseFeatures
from curvlin.testing import forbid_dense
from curvlin_nn import Laplace, evidence_bound
from curvlin_nn.capture import graph
from curvlin_nn.errors import (
    DataError,
    NoFiniteOptimumError,
    NotFittedError,
    StaleModelError,
    UnsupportedError,
)
from curvlin_nn.feature_maps import FeatureMap, JacobianMap, NystromMap, SketchMap
from curvlin_nn.feature_maps.directions import FlatDirections
from curvlin_nn.feature_maps.projected import ProjectedMap

RANK = 4
SIGMAS = torch.tensor([0.3, 0.8, 1.7], dtype=torch.float64)


def features_of(p: Problem, rank: int | None = RANK) -> NystromMap:
    return NystromMap(p.model, p.x, rank=rank, outputs="all")


def dense_bound(p: Problem, rank: int, delta: float, sigma: float | torch.Tensor) -> float:
    """By the formula: Jacobians by autodiff of each sample, V by an SVD, output Hessians by autodiff of the loss."""
    J = oracle.jacobian(p.model, p.x)
    Lambda = oracle.output_hessians(p.model, p.x, p.y, oracle.LOSSES[p.likelihood])
    V = torch.linalg.svd(J.flatten(0, 1), full_matrices=False)[2][:rank].mT
    Phi = J @ V
    sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(Lambda.shape[-1])
    Lambda = Lambda / torch.outer(sigma, sigma) / TEMPERATURE
    H = torch.einsum("nck,ncd,ndl->kl", Phi, Lambda, Phi)
    left_out = torch.einsum("ncd,ndc->", Lambda, J @ J.mT - Phi @ Phi.mT)
    with torch.no_grad():
        f = p.model(p.x)
    log_p = (
        torch.distributions.Categorical(logits=f).log_prob(p.y).sum()
        if p.likelihood == "classification"
        else torch.distributions.Normal(f, sigma).log_prob(p.y).sum()
    )
    theta = torch.cat([q.detach().flatten() for q in p.model.parameters()]) - 0.1
    complexity = torch.slogdet(torch.eye(len(H)).double() + H / delta)[1]
    value = log_p / TEMPERATURE - delta * theta.square().sum() / 2 - complexity / 2 - left_out / (2 * delta)
    return float(value)


# -- the value ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_value_is_the_dense_formula(kind, likelihood):
    p = problem(kind, likelihood)
    la = fitted(p, features_of(p))
    found = la.log_marginal_likelihood_bound(p.batches())
    assert float(found) == pytest.approx(dense_bound(p, RANK, DELTA, sigma_of(p)), rel=1e-10)
    assert found.dtype == torch.float64 and found.shape == ()
    if likelihood == "regression":  # elsewhere, without the data
        elsewhere = la.log_marginal_likelihood_bound(prior_precision=2.5, sigma_noise=1.3)
        assert float(elsewhere) == pytest.approx(dense_bound(p, RANK, 2.5, 1.3), rel=1e-10)


def test_value_with_one_noise_scale_for_each_output():
    p = problem("cnn", "regression")
    la = fitted(p, features_of(p), sigma_noise=SIGMAS)
    found = float(la.log_marginal_likelihood_bound(p.batches()))
    assert found == pytest.approx(dense_bound(p, RANK, DELTA, SIGMAS), rel=1e-10)
    one = float(la.log_marginal_likelihood_bound(sigma_noise=0.4))
    assert one == pytest.approx(dense_bound(p, RANK, DELTA, 0.4), rel=1e-10)


@pytest.mark.parametrize("sigma", [0.4, SIGMAS])
def test_batches_and_columns_may_come_in_any_parts(monkeypatch, sigma):
    p = problem("cnn", "regression")
    feature_map = features_of(p)
    whole = fitted(p, feature_map, sigma_noise=sigma).log_marginal_likelihood_bound([(p.x, p.y)])
    monkeypatch.setattr(graph, "COLUMN_BUDGET", 1)
    single = fitted(p, feature_map, sigma_noise=sigma).log_marginal_likelihood_bound(p.batches(1))
    torch.testing.assert_close(single, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_it_is_below_the_evidence_of_the_full_curvature_and_rises_to_it(kind, likelihood):
    p = problem(kind, likelihood)
    exact = fitted(p, None)
    n_rows = features_of(p, None).size
    maps = [features_of(p, rank) for rank in (1, 4, 10, n_rows)]
    posteriors = [fitted(p, m) for m in maps]
    for delta in (1e-2, DELTA, 30.0):
        values = [float(la.log_marginal_likelihood_bound(p.batches(), delta)) for la in posteriors]
        assert values == sorted(values)
        evidence = float(exact.log_marginal_likelihood(delta))
        assert values[-2] < evidence
        assert values[-1] == pytest.approx(evidence, rel=1e-10)  # V spans all rows


LIKELIHOODS = {
    "weighted": nn.CrossEntropyLoss(
        weight=torch.tensor([0.3, 1.0, 2.5]).double(), ignore_index=-100, reduction="sum"
    ),
    "binary": "binary",
    "poisson": "poisson",
    "heteroscedastic": "heteroscedastic",
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_it_is_below_the_evidence_for_every_likelihood(name):
    p = problem("mlp", "regression", n_outputs=2 if name == "heteroscedastic" else 3)
    targets = {
        "weighted": torch.tensor([0, 1, 2, -100, 1, 0, 2, 2]),
        "binary": (p.y > 0).double(),
        "poisson": p.y.abs().round(),
        "heteroscedastic": p.y[:, :1],
    }
    p = Problem(p.model, LIKELIHOODS[name], p.x, targets[name], p.x_test)
    exact = float(fitted(p, None, sigma_noise=1.0).log_marginal_likelihood())
    few, everything = (fitted(p, features_of(p, rank), sigma_noise=1.0) for rank in (3, None))
    assert float(few.log_marginal_likelihood_bound(p.batches())) < exact
    assert float(everything.log_marginal_likelihood_bound(p.batches())) == pytest.approx(exact, rel=1e-10)


def test_it_is_below_the_evidence_of_the_empirical_fisher_matrix():
    p = problem("mlp", "classification")
    exact = float(fitted(p, None, curvature="ef").log_marginal_likelihood())
    few, everything = (fitted(p, features_of(p, rank), curvature="ef") for rank in (3, None))
    assert float(few.log_marginal_likelihood_bound(p.batches())) < exact
    assert float(everything.log_marginal_likelihood_bound(p.batches())) == pytest.approx(exact, rel=1e-10)


def test_a_network_of_one_output_on_one_sample_and_outputs_of_several_axes():
    p = problem("mlp", "regression", n=1, n_outputs=1)
    la = fitted(p, NystromMap(p.model, p.x))
    exact = float(fitted(p, None).log_marginal_likelihood())
    assert float(la.log_marginal_likelihood_bound(p.batches())) == pytest.approx(exact, rel=1e-10)
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4).double()
    for model, y in (
        (Sequences().double(), torch.randint(2, (6,))),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Unflatten(1, (2, 3))).double(),
            torch.randint(3, (6, 2)),
        ),
    ):
        full = Laplace(model, "classification", "all", "full").fit([(x, y)])
        everything = NystromMap(model, x, outputs="all")
        la = Laplace(model, "classification", feature_map=everything).fit([(x, y)])
        found = float(la.log_marginal_likelihood_bound([(x, y)]))
        assert found == pytest.approx(float(full.log_marginal_likelihood()), rel=1e-10)
        some = Laplace(model, "classification", feature_map=NystromMap(model, x, rank=3)).fit([(x, y)])
        assert float(some.log_marginal_likelihood_bound([(x, y)])) < found


def test_float32_networks_lose_nothing_but_rounding():
    p = problem("cnn", "regression")
    expected = float(fitted(p, features_of(p)).log_marginal_likelihood_bound(p.batches()))
    p = Problem(p.model.float(), p.likelihood, p.x.float(), p.y.float(), p.x_test.float())
    found = fitted(p, features_of(p)).log_marginal_likelihood_bound(p.batches())
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_derivatives_are_exact():
    p = problem("mlp", "regression")
    la = fitted(p, features_of(p))
    la.log_marginal_likelihood_bound(p.batches())
    point = tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.5, 0.2, 0.9))

    def bound(prior, sigma, mean, temperature):
        return la.log_marginal_likelihood_bound(None, prior, sigma, prior_mean=mean, temperature=temperature)

    assert torch.autograd.gradcheck(bound, point) and torch.autograd.gradgradcheck(bound, point)


# -- the maximum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_the_search_ends_where_the_gradient_vanishes_from_any_start(kind, likelihood):
    p = problem(kind, likelihood)
    with_noise = likelihood == "regression"
    feature_map, found = features_of(p), []
    for start in (1e-6, 1.0, 1e6):
        la = fitted(p, feature_map, prior_precision=start)
        optimum = la.optimize_prior_precision("bound", train_loader=p.batches(), optimize_noise=with_noise)
        logs = (
            torch.tensor([float(la.prior_precision), float(la.sigma_noise)], dtype=torch.float64)
            .log()
            .requires_grad_()
        )
        value = la.log_marginal_likelihood_bound(None, *logs.exp()[: 1 + with_noise])
        (gradient,) = torch.autograd.grad(value, logs)
        assert gradient.abs().max() < 1e-7 and optimum.gradient_norm < 1e-7
        assert optimum.log_marginal_likelihood == pytest.approx(float(value.detach()), rel=1e-12)
        assert torch.equal(la.prior_precision, optimum.prior_precision.squeeze())
        found.append(logs.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=1e-8)
    on_features = fitted(p, feature_map)
    on_features.optimize_prior_precision(optimize_noise=with_noise)
    assert not math.isclose(float(on_features.prior_precision), float(la.prior_precision), rel_tol=1e-3)


@pytest.mark.parametrize("optimize_noise", [True, False])
def test_the_search_with_one_noise_scale_for_each_output(optimize_noise):
    p = problem("mlp", "regression", n=30)
    la = fitted(p, features_of(p, 20), sigma_noise=SIGMAS)
    optimum = la.optimize_prior_precision("bound", train_loader=p.batches(), optimize_noise=optimize_noise)
    prior = la.prior_precision.clone().requires_grad_()
    sigma = la.sigma_noise.clone().requires_grad_()
    value = la.log_marginal_likelihood_bound(None, prior, sigma)
    gradients = torch.autograd.grad(value, [prior, sigma])
    by_logs = [(g * at).detach().abs().max() for g, at in zip(gradients, (prior, sigma), strict=True)]
    assert by_logs[0] < 1e-6 and (by_logs[1] < 1e-6) == optimize_noise
    assert optimum.log_marginal_likelihood == pytest.approx(float(value.detach()), rel=1e-12)


def test_with_all_directions_it_is_the_optimum_of_the_evidence():
    p = problem("mlp", "regression", n=12)
    la, exact = fitted(p, features_of(p, None)), fitted(p, None)
    found = la.optimize_prior_precision("bound", train_loader=p.batches(), optimize_noise=True)
    wanted = exact.optimize_prior_precision(optimize_noise=True)
    torch.testing.assert_close(found.prior_precision, wanted.prior_precision, rtol=1e-6, atol=0)
    assert found.sigma_noise == pytest.approx(wanted.sigma_noise, rel=1e-6)
    assert found.log_marginal_likelihood == pytest.approx(wanted.log_marginal_likelihood, rel=1e-10)


def test_held_out_data_are_predicted_better_than_at_the_maximum_on_features():
    """Too few directions for what data decide: the evidence on features cannot tell what the residual adds."""
    torch.manual_seed(0)

    def drawn(n):
        x = 4 * torch.rand(n, 2).double() - 2
        return x, torch.sin(2 * x[:, :1]) * torch.cos(x[:, 1:]) + 0.1 * torch.randn(n, 1).double()

    x, y = drawn(100)
    x_test, y_test = drawn(500)
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2, weight_decay=1e-4)
    for _ in range(400):
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
    scores = {}
    for method in ("marglik", "bound"):
        feature_map = NystromMap(model, x, rank=8)
        la = Laplace(model, "regression", feature_map=feature_map).fit([(x, y)])
        la.optimize_prior_precision(method, train_loader=[(x, y)], optimize_noise=True)
        mean, variance = la(x_test, diagonal_output=True, observation_noise=True)
        scores[method] = -float(torch.distributions.Normal(mean, variance.sqrt()).log_prob(y_test).mean())
    assert scores["bound"] < scores["marglik"] - 0.4  # 0.57 to 0.84 over eight seeds


# -- the object ----------------------------------------------------------------------------------------------------


def test_the_data_are_gone_through_once_for_each_fit(tmp_path):
    p = problem("mlp", "classification")
    m = features_of(p)
    la = fitted(p, m)
    passes = []

    def loader():
        passes.append(1)
        yield from p.batches()

    class Loader:
        def __iter__(self):
            return loader()

    before, kept = state(p.model), torch.get_rng_state()
    value = float(la.log_marginal_likelihood_bound(Loader()))
    assert_same(before, state(p.model))
    assert torch.equal(torch.get_rng_state(), kept)
    la.optimize_prior_precision("bound", train_loader=Loader())
    best = float(la.log_marginal_likelihood_bound())
    assert best > value and len(passes) == 1
    la.save(tmp_path / "la")
    again = Laplace.load(tmp_path / "la", p.model, feature_map=m)
    assert float(again.log_marginal_likelihood_bound()) == best
    older = {name: v for name, v in la.state_dict().items() if name != "left_out"}
    again.load_state_dict(older)
    with pytest.raises(UnsupportedError, match="needs train_loader"):
        again.log_marginal_likelihood_bound()
    assert float(again.log_marginal_likelihood_bound(p.batches())) == pytest.approx(best, rel=1e-12)
    la.fit(p.batches(), override=False)
    with pytest.raises(UnsupportedError, match="needs train_loader"):
        la.log_marginal_likelihood_bound()
    twice = la.log_marginal_likelihood_bound(p.batches() + p.batches())
    whole = Laplace(p.model, p.likelihood, feature_map=m, temperature=TEMPERATURE, prior_mean=0.1)
    whole.fit(p.batches() + p.batches()).prior_precision = la.prior_precision
    expected = whole.log_marginal_likelihood_bound(p.batches() + p.batches())
    torch.testing.assert_close(twice, expected, rtol=1e-12, atol=0)


def test_no_jacobian_is_multiplied_out():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    n, limit = 60, 60 * 10 * 16 * 64  # gradients of all outputs with respect to the widest layer
    x = torch.randn(n, 64)
    data = [(x, torch.randint(10, (n,)))]
    la = Laplace(model, "classification", feature_map=NystromMap(model, x, rank=3)).fit(data)
    assert 10 * limit < n * 10 * sum(p.numel() for p in model.parameters())
    with forbid_dense(limit):
        la.log_marginal_likelihood_bound(data)


def test_in_inference_mode():
    p = problem("mlp", "regression")
    la = fitted(p, features_of(p))
    with torch.inference_mode():
        la.log_marginal_likelihood_bound(p.batches())
    prior = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    la.log_marginal_likelihood_bound(prior_precision=prior).backward()
    assert float(prior.grad) != 0


class Learned(FeatureMap):
    """Features that stand in for a Jacobian without being one in any directions."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def size(self) -> int:
        return 2

    @property
    def jacobian(self) -> JacobianMap:
        return JacobianMap(self.model)

    def __call__(self, x):
        with torch.no_grad():
            return self.model(x), DenseFeatures(x[:, None, :2].expand(-1, 3, 2).clone())


class Axes(ProjectedMap):
    """The Jacobian in some directions of one's own."""

    orthonormal = True


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda p: None, {}, "needs a feature_map that stands in for a Jacobian"),
        (lambda p: JacobianMap(p.model), {}, "needs a feature_map that stands in for a Jacobian"),
        (
            lambda p: Learned(p.model),
            {},
            "feature_map=Learned has no bound of the evidence: what features that are",
        ),
        (lambda p: SketchMap(p.model, 6), {}, "feature_map=SketchMap has no bound"),
        (features_of, {"residual": False}, "with residual=False there is nothing beside"),
        (features_of, {"curvature": "fisher_mc"}, "curvature='fisher_mc' draws anew"),
    ],
)
def test_posteriors_without_such_a_bound_are_refused(make, options, message):
    p = problem("mlp", "regression")
    la = fitted(p, make(p), **options)
    with pytest.raises(UnsupportedError, match=message):
        la.log_marginal_likelihood_bound(p.batches())
    with pytest.raises(UnsupportedError, match=message):
        la.optimize_prior_precision("bound", train_loader=p.batches())
    assert float(la.prior_precision) == DELTA


def test_data_that_cannot_be_those_of_the_fit_are_refused():
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", feature_map=features_of(p))
    with pytest.raises(NotFittedError):
        la.log_marginal_likelihood_bound(p.batches())
    la.fit(p.batches())
    with pytest.raises(
        UnsupportedError, match="needs train_loader, the batches that fit was given; found None"
    ):
        la.optimize_prior_precision("bound")
    with pytest.raises(
        DataError, match=r"yielded 3 samples, expected the 8 that the posterior was fitted to"
    ):
        la.log_marginal_likelihood_bound(p.batches()[:1])
    with pytest.raises(DataError, match="the loader yielded no batch"):
        la.log_marginal_likelihood_bound([])
    with pytest.raises(
        UnsupportedError, match="prior_structure='layerwise' is not supported with a feature_map"
    ):
        la.optimize_prior_precision("bound", "layerwise", train_loader=p.batches())
    with pytest.raises(ValueError, match="prior_precision must be positive and finite"):
        la.log_marginal_likelihood_bound(p.batches(), -1.0)
    with torch.no_grad():
        p.model[0].weight += 1
    la.fit(p.batches())
    with torch.no_grad():
        p.model[0].weight -= 1
    with pytest.raises(StaleModelError, match=r"'0.weight' of the model changed since fit"):
        la.log_marginal_likelihood_bound(p.batches())


@pytest.mark.parametrize("sigma", [0.4, SIGMAS])
def test_what_is_left_out_gives_an_optimum_where_features_alone_have_none(sigma):
    p = problem("mlp", "regression", n=30)
    p.x[:, 3] = 0  # the first layer's weights of it have no influence at all
    J = JacobianMap(p.model)
    V = torch.zeros(J.size, 2).double()
    V[3, 0] = V[7, 1] = 1
    with torch.no_grad():
        exact_fit = Problem(p.model, p.likelihood, p.x, p.model(p.x), p.x_test)
    for data, feature_map in ((p, Axes(J, FlatDirections(V))), (exact_fit, features_of(p, 5))):
        la = fitted(data, feature_map, sigma_noise=sigma)
        with pytest.raises(NoFiniteOptimumError):
            la.optimize_prior_precision(optimize_noise=True)
        optimum = la.optimize_prior_precision("bound", train_loader=data.batches(), optimize_noise=True)
        assert optimum.gradient_norm < 1e-6


def test_parameters_at_the_prior_mean_have_no_optimum():
    p = problem("mlp", "regression")
    theta = torch.cat([q.detach().flatten() for q in p.model.parameters()])
    la = fitted(p, features_of(p), prior_mean=theta)
    with pytest.raises(NoFiniteOptimumError, match="equals the prior mean exactly"):
        la.optimize_prior_precision("bound", train_loader=p.batches())


def test_traces_are_those_of_the_curvature_of_each_output():
    p = problem("mlp", "regression")
    la = fitted(p, features_of(p), sigma_noise=SIGMAS)
    found = evidence_bound.left_out_curvature(la, p.batches())
    J = oracle.jacobian(p.model, p.x)
    V = torch.linalg.svd(J.flatten(0, 1), full_matrices=False)[2][:RANK].mT
    expected = J.square().sum((0, 2)) - (J @ V).square().sum((0, 2))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
