"""The prior by grid, Brent's method and cross-validation on held-out data, against predictions one by one."""

import copy
import math

import network_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from networks import problem
from scipy.optimize import minimize_scalar
from torch import nn
from torch.distributions import Categorical, MultivariateNormal
from torchmetrics import Accuracy, MeanSquaredError, Metric

from curvlin_nn import Laplace, held_out, kept_features, likelihoods
from curvlin_nn.errors import DataError, NoFiniteOptimumError, StaleModelError, UnsupportedError
from curvlin_nn.evidence import Curvature
from curvlin_nn.feature_maps import JacobianMap, NystromMap, SketchMap
from curvlin_nn.fingerprint import Fingerprint

STRUCTURES = ("full", "kron", "diag", "block", "ekfac", "lowrank")


def fitted(p, structure="kron", **options):
    return Laplace(p.model, p.likelihood, "all", structure, **options).fit(p.batches())


def validation(p, n=7):
    """Inputs near the data, with targets of both kinds, in batches of two sizes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, *p.x.shape[1:], generator=generator).double()
    with torch.no_grad():
        f = p.model(x)
    if p.likelihood == "classification":
        y = Categorical(logits=4 * f).sample()
    else:
        y = f + 0.5 * torch.randn(f.shape, generator=generator).double()
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def float64(values):
    return torch.tensor(list(values), dtype=torch.float64)


def nll(la, data, precision):
    """In nats for each sample, by a posterior of its own."""
    la = copy.copy(la)
    la.prior_precision = precision
    total = 0.0
    for x, y in data:
        if la.likelihood.name == "classification":
            total -= float(la(x).log().gather(1, y[:, None]).sum())
        else:
            total -= float(MultivariateNormal(*la(x, observation_noise=True)).log_prob(y).sum())
    return total / sum(len(y) for _, y in data)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_curve_is_that_of_predictions_one_by_one(structure, kind, likelihood):
    p = problem(kind, likelihood)
    la = fitted(p, structure, temperature=0.7, sigma_noise=0.6 if likelihood == "regression" else 1.0)
    data = validation(p)
    found = la.optimize_prior_precision("gridsearch", val_loader=data, grid_size=5)
    expected = float64(nll(la, data, float(delta)) for delta in found.precisions)
    torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.precisions, float64([1e-4, 1e-2, 1.0, 1e2, 1e4]), rtol=1e-12, atol=0)
    best = int(expected.argmin())
    assert found.prior_precision == float(la.prior_precision) == float(found.precisions[best])
    assert found.score == float(found.scores[best])
    assert found.at_edge == (best in (0, 4))


def test_dense_predictions_are_scored():
    """Nothing of the library but the curve."""
    p = problem("mlp", "classification")
    la, data = fitted(p, "full"), validation(p)
    found = la.optimize_prior_precision("gridsearch", val_loader=data, grid_size=3)
    H = oracle.curvature(p.model, p.x, p.y, "classification", "full")
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    for delta, score in zip(found.precisions, found.scores, strict=True):
        joint = oracle.covariance(p.model, x, H + delta * torch.eye(len(H)))
        probabilities = oracle.probit(p.model(x).detach(), joint.diagonal().view(len(x), 3))
        assert float(score) == pytest.approx(float(F.nll_loss(probabilities.log(), y)), rel=1e-9)


@pytest.mark.parametrize("likelihood", ["regression", "binary", "poisson"])
def test_a_model_of_one_number_is_scored_at_targets_of_the_same_shape(likelihood):
    """Outputs ``(N,)`` as targets are, of data that were fitted to in the same form."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(2, (9,)).double()
    la = Laplace(model, likelihood, "all", "kron").fit([(x, y)])
    found = la.optimize_prior_precision(
        "gridsearch", val_loader=[(x[:5], y[:5]), (x[5:], y[5:])], grid_size=3
    )
    for delta, score in zip(found.precisions, found.scores, strict=True):
        la.prior_precision = float(delta)
        if likelihood == "regression":
            mean, variance = la(x, observation_noise=True, diagonal_output=True)
            log_p = torch.distributions.Normal(mean[:, 0], variance[:, 0].sqrt()).log_prob(y)
        else:
            family = {"binary": torch.distributions.Bernoulli, "poisson": torch.distributions.Poisson}
            log_p = family[likelihood](la(x)[:, 0]).log_prob(y)
        assert float(score) == pytest.approx(-float(log_p.mean()), rel=1e-9)


@pytest.mark.parametrize(
    ("link_approx", "pred_type"),
    [("mc", "glm"), ("probit", "glm")],
)
def test_every_link_is_scored_with_the_same_draws(link_approx, pred_type):
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    generator = torch.Generator().manual_seed(5)
    found = la.optimize_prior_precision(
        "gridsearch",
        val_loader=data[:1],
        grid_size=3,
        link_approx=link_approx,
        pred_type=pred_type,
        n_samples=8,
        generator=generator,
    )
    x, y = data[0]
    for delta, score in zip(found.precisions, found.scores, strict=True):
        la.prior_precision = float(delta)
        again = la(x, link_approx=link_approx, n_samples=8, generator=torch.Generator().manual_seed(5))
        assert float(score) == pytest.approx(float(F.nll_loss(again.log(), y)), rel=1e-6)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_precisions_are_tried_with_the_same_draws_without_a_generator(pred_type):
    """Two that are almost the same have almost the same score, which they have not by other draws."""
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    options = {"pred_type": pred_type, "link_approx": "mc", "n_samples": 4, "grid_size": 3}
    near = {"log_prior_prec_min": 0, "log_prior_prec_max": 1e-9}
    found = la.optimize_prior_precision("gridsearch", val_loader=data, **options, **near)
    torch.testing.assert_close(found.scores, found.scores[:1].expand(3), rtol=1e-7, atol=0)
    again = la.optimize_prior_precision("gridsearch", val_loader=data, **options, **near)
    assert float((again.scores - found.scores).abs().max()) > 1e-4  # draws go on, and matter


@pytest.mark.parametrize("link_approx", ["probit", "mc"])
def test_covariances_that_do_not_fit_at_once_are_had_in_turn(link_approx, monkeypatch):
    p = problem("cnn", "classification")
    la, data = fitted(p), validation(p)
    generator = torch.Generator()

    def found():
        return la.optimize_prior_precision(
            "gridsearch",
            val_loader=data,
            grid_size=7,
            link_approx=link_approx,
            generator=generator.manual_seed(1),
        )

    at_once = found()
    for budget in (0, 50):
        monkeypatch.setattr(kept_features, "SPREAD_BUDGET", budget)
        torch.testing.assert_close(found().scores, at_once.scores, rtol=1e-12, atol=0)


class Total(Metric):
    """A metric that adds up, so that a missing reset shows."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.total += F.nll_loss(preds.log(), target, reduction="sum")

    def compute(self):
        return self.total


def test_a_metric_starts_anew_at_each_precision_and_stays_as_it_was():
    """laplace-torch goes on with one metric, so that each score is a mean over all earlier precisions."""
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    metric = Total()
    metric.update(torch.full((1, 3), 1 / 3), torch.tensor([0]))
    before = float(metric.compute())
    found = la.optimize_prior_precision("gridsearch", val_loader=data, loss=metric, grid_size=7)
    expected = la.optimize_prior_precision("gridsearch", val_loader=data, grid_size=7)
    torch.testing.assert_close(found.scores / 7, expected.scores, rtol=1e-9, atol=0)
    assert float(metric.compute()) == before


def test_functions_and_metrics_get_what_they_ask_for():
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    accuracy = la.optimize_prior_precision(
        "gridsearch", val_loader=data, loss=Accuracy("multiclass", num_classes=3), grid_size=3
    )
    la.prior_precision = accuracy.prior_precision
    right = float((la(x).argmax(-1) == y).double().mean())
    assert accuracy.score == pytest.approx(-right, rel=1e-6)  # better when higher

    q = problem("mlp", "regression")
    lb, data = fitted(q), validation(q)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    width = lb.optimize_prior_precision(
        "gridsearch",
        val_loader=data,
        loss=lambda mean, cov, y: cov.diagonal(dim1=1, dim2=2).sum(),
        grid_size=3,
    )
    assert width.prior_precision == pytest.approx(1e4)
    assert float(lb(x, diagonal_output=True)[1].sum()) == pytest.approx(width.score, rel=1e-9)
    for loss in (lambda mean, y: (mean - y).square().mean(), MeanSquaredError()):
        flat = lb.optimize_prior_precision("gridsearch", val_loader=data, loss=loss, grid_size=3)
        assert flat.score == pytest.approx(float((q.model(x).detach() - y).square().mean()), rel=1e-6)


def test_brent_finds_the_minimum_that_a_fine_search_finds():
    torch.manual_seed(0)
    x = torch.randn(40, 2).double()
    y = torch.stack([x[:, 0].sin(), x.prod(1)], 1) + 0.3 * torch.randn(40, 2).double()
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        F.mse_loss(model(x[:20]), y[:20]).backward()
        optimiser.step()
    la = Laplace(model, "regression", "all", "kron", sigma_noise=0.5).fit([(x[:20], y[:20])])
    data = [(x[20:], y[20:])]
    found = la.optimize_prior_precision("brent", val_loader=data, log_prior_prec_min=-3, log_prior_prec_max=3)
    reference = minimize_scalar(
        lambda u: nll(la, data, 10**u), bounds=(-3, 3), method="bounded", options={"xatol": 1e-8}
    )
    assert not found.at_edge
    assert math.log10(found.prior_precision) == pytest.approx(reference.x, abs=2e-3)
    assert found.score == pytest.approx(reference.fun, abs=1e-6)
    assert len(found.precisions) == len(found.scores) < 30
    assert bool((found.precisions.diff() > 0).all())


@pytest.mark.parametrize("budget", [0, 150])
def test_features_that_are_not_kept_are_computed_again(budget, monkeypatch):
    p = problem("mlp", "regression")
    la, data = fitted(p), validation(p)
    kept = la.optimize_prior_precision("brent", val_loader=data, tolerance=1.0)
    monkeypatch.setattr(held_out, "KEPT_BUDGET", budget)
    again = la.optimize_prior_precision("brent", val_loader=data, tolerance=1.0)
    torch.testing.assert_close(again.scores, kept.scores, rtol=1e-12, atol=0)


def test_jacobians_are_computed_once_for_all_precisions(monkeypatch):
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    calls = []
    original = kept_features.View.pieces
    monkeypatch.setattr(kept_features.View, "pieces", lambda self, x: calls.append(1) or original(self, x))
    la.optimize_prior_precision("gridsearch", val_loader=data, grid_size=20)
    assert len(calls) == len(data)
    la.optimize_prior_precision("brent", val_loader=data, tolerance=1.0)
    assert len(calls) == 2 * len(data)


MAPS = {
    "orthonormal": lambda p: {"feature_map": NystromMap(p.model, p.x, rank=6, outputs="all")},
    "learned": lambda p: {"feature_map": SketchMap(p.model, 6, generator=torch.Generator().manual_seed(1))},
    "no residual": lambda p: {"feature_map": NystromMap(p.model, p.x, rank=6), "residual": False},
    "parameters": lambda p: {"feature_map": JacobianMap(p.model)},
}


@pytest.mark.parametrize(
    ("likelihood", "link_approx"),
    [("classification", "probit"), ("classification", "mc"), ("regression", "probit")],
)
@pytest.mark.parametrize("features", MAPS)
@pytest.mark.parametrize("budget", [0, 2**20])
def test_features_and_their_residual_are_computed_once(
    features, likelihood, link_approx, budget, monkeypatch
):
    """The curve is that of predictions one by one; a budget too small computes again, to the same numbers."""
    p = problem("mlp", likelihood)
    options = MAPS[features](p) | {"temperature": 0.7, "prior_mean": 0.1}
    if likelihood == "regression":
        options["sigma_noise"] = 0.6
    la, data = Laplace(p.model, likelihood, **options).fit(p.batches()), validation(p)
    calls = calls_of(type(la.feature_map), monkeypatch)
    monkeypatch.setattr(held_out, "KEPT_BUDGET", budget)
    search = {"val_loader": data, "link_approx": link_approx, "n_samples": 8}
    few, many = (
        la.optimize_prior_precision(
            "gridsearch", grid_size=size, generator=torch.Generator().manual_seed(5), **search
        )
        for size in (3, 5)
    )
    counts = len(calls)
    torch.testing.assert_close(few.scores, many.scores[::2], rtol=1e-12, atol=0)
    la.prior_precision = 3.0
    la.optimize_prior_precision("gridsearch", grid_size=25, **search)
    assert 2 * (len(calls) - counts) == counts > 0  # as many for 25 precisions as for three or five
    expected = float64(one_by_one(la, data, float(delta), link_approx) for delta in many.precisions)
    torch.testing.assert_close(many.scores, expected, rtol=1e-10, atol=0)


def calls_of(kind, monkeypatch):
    """Grows by one whenever features of this kind are computed."""
    calls = []

    def counted(method):
        return lambda self, x: calls.append(method) or method(self, x)

    for name in ("__call__", "with_jacobian"):
        monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    return calls


def one_by_one(la, data, precision, link_approx):
    """`nll` with the draws of a search, the same for every precision."""
    if link_approx != "mc":
        return nll(la, data, precision)
    la, total, generator = copy.copy(la), 0.0, torch.Generator().manual_seed(5)
    la.prior_precision = precision
    for x, y in data:
        drawn = la(x, link_approx="mc", n_samples=8, generator=generator)
        total -= float(drawn.log().gather(1, y[:, None]).sum())
    return total / sum(len(y) for _, y in data)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_a_model_is_compared_once_for_all_precisions(pred_type, monkeypatch):
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    compared, difference = [], Fingerprint.difference
    monkeypatch.setattr(
        Fingerprint, "difference", lambda self, model: compared.append(1) or difference(self, model)
    )
    la.optimize_prior_precision("gridsearch", val_loader=data, grid_size=5, pred_type=pred_type, n_samples=2)
    assert len(compared) == 1
    with torch.no_grad():
        p.model[0].bias.add_(1)
    with pytest.raises(StaleModelError):  # the object itself goes on comparing
        la(data[0][0])


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "block"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_cross_validation_scores_each_fold_with_the_curvature_of_the_others(likelihood, structure):
    p = problem("mlp", likelihood, n=11)
    la = fitted_all(p, structure)
    found = la.optimize_prior_precision("cv", train_loader=ragged(p), n_folds=3, grid_size=5)
    expected = torch.zeros(5).double()
    for fold in range(3):
        held = torch.arange(11) % 3 == fold
        others = Laplace(p.model, likelihood, "all", structure).fit([(p.x[~held], p.y[~held])])
        data = [(p.x[held], p.y[held])]
        expected += int(held.sum()) * float64(nll(others, data, float(d)) for d in found.precisions)
    torch.testing.assert_close(found.scores, expected / 11, rtol=1e-9, atol=0)
    assert float(la.prior_precision) == found.prior_precision
    whole = Laplace(p.model, likelihood, "all", structure).fit(ragged(p))
    assert torch.equal(la.curvature.to_dense(), whole.curvature.to_dense())


@pytest.mark.parametrize(
    "options",
    [
        {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.tensor([3, 40, 17, 60, 61])},
        {"subset_of_weights": "all", "damping": True},
        {"subset_of_weights": "last_layer"},
    ],
    ids=["subnetwork", "damped", "last layer"],
)
def test_cross_validation_and_grids_know_of_every_choice(options):
    p = problem("mlp", "classification", n=11)
    la = Laplace(p.model, p.likelihood, hessian_structure="kron", **options).fit(ragged(p))
    found = la.optimize_prior_precision("cv", train_loader=ragged(p), n_folds=3, grid_size=4)
    expected = torch.zeros(4).double()
    for fold in range(3):
        held = torch.arange(11) % 3 == fold
        others = Laplace(p.model, p.likelihood, hessian_structure="kron", **options)
        others.fit([(p.x[~held], p.y[~held])])
        data = [(p.x[held], p.y[held])]
        scores = float64(nll(others, data, float(d)) for d in found.precisions)
        by_grid = others.optimize_prior_precision("gridsearch", val_loader=data, grid_size=4)
        torch.testing.assert_close(by_grid.scores, scores, rtol=1e-9, atol=0)
        expected += int(held.sum()) * scores
    torch.testing.assert_close(found.scores, expected / 11, rtol=1e-9, atol=0)


def ragged(p):
    return [(p.x[:2], p.y[:2]), (p.x[2:9], p.y[2:9]), (p.x[9:], p.y[9:])]


def fitted_all(p, structure):
    return Laplace(p.model, p.likelihood, "all", structure).fit(ragged(p))


@pytest.mark.parametrize(
    "case",
    [
        (
            "binary",
            likelihoods.Bernoulli,
            lambda n: torch.randint(2, (n, 3)).double(),
            F.binary_cross_entropy,
        ),
        ("poisson", likelihoods.Poisson, lambda n: torch.randint(4, (n, 3)).double(), None),
    ],
    ids=lambda case: case[0],
)
def test_other_links_are_scored_by_their_own_density(case):
    _, family, targets, _ = case
    p = problem("mlp", "regression")
    y = targets(8)
    la = Laplace(p.model, family(), "all", "kron").fit([(p.x, y)])
    found = la.optimize_prior_precision("gridsearch", val_loader=[(p.x, y)], grid_size=3)
    for delta, score in zip(found.precisions, found.scores, strict=True):
        la.prior_precision = float(delta)
        prediction = la(p.x)
        density = torch.distributions.Bernoulli if case[0] == "binary" else torch.distributions.Poisson
        assert float(score) == pytest.approx(float(-density(prediction).log_prob(y).sum() / 8), rel=1e-9)


def test_rewards_need_a_loss():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(6, 2, 4).double(), F.one_hot(torch.randint(2, (6,)), 2)
    la = Laplace(model, "reward_modeling", "all", "kron").fit([(x, y)])
    with pytest.raises(UnsupportedError, match="have no density of targets; give a loss"):
        la.optimize_prior_precision("gridsearch", val_loader=[(x, y)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UnsupportedError, "needs val_loader, batches"),
        ({"method": "cv"}, UnsupportedError, "needs train_loader, batches"),
        ({"val_loader": []}, DataError, "val_loader yielded no batch"),
        ({"loss": 3}, UnsupportedError, "loss must be None, a torchmetrics.Metric or a function"),
        ({"prior_structure": "layerwise"}, UnsupportedError, "leave prior_structure at 'scalar'"),
        ({"log_prior_prec_min": 5}, ValueError, "log_prior_prec_min < log_prior_prec_max"),
        ({"grid_size": 0}, ValueError, "grid_size must be a positive integer"),
        ({"method": "cv", "n_folds": 1}, ValueError, "n_folds must be at least 2"),
        ({"method": "cv", "n_folds": 99}, DataError, "needs as many samples, found 7"),
        ({"loss": lambda p, y: float("nan")}, DataError, "no prior precision has a finite score"),
        ({"optimize_temperature": True}, NoFiniteOptimumError, "convex in 1 / T"),
    ],
)
def test_what_is_not_served_says_so_and_changes_nothing(options, error, message):
    p = problem("mlp", "classification")
    la = fitted(p)
    loader = "train_loader" if options.get("method") == "cv" else "val_loader"
    given = {"method": "gridsearch", "grid_size": 3, **options}
    if message.startswith("needs") and options.get("n_folds") is None:
        pass
    elif "val_loader" not in given:
        given[loader] = validation(p)
    before, posterior = la.prior_precision, la.posterior_precision
    with pytest.raises(error, match=message):
        la.optimize_prior_precision(**given)
    assert la.prior_precision is before
    assert la.posterior_precision is posterior


@pytest.mark.parametrize("structure", ["ekfac", "kfoc", "lowrank", {"0": "ekfac", "*": "full"}])
def test_structures_that_do_not_merge_have_two_folds_and_no_more(structure):
    p = problem("mlp", "classification", n=9)
    la = fitted(p, structure)
    seen = []
    p.model[0].register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(UnsupportedError, match=r"n_folds=5 adds .*; take n_folds=2"):
        la.optimize_prior_precision("cv", train_loader=p.batches())
    with pytest.raises(UnsupportedError, match="cannot"):
        la.fit(p.batches(), override=False)
    assert not seen  # said before the model is run on all data
    la.optimize_prior_precision("cv", train_loader=p.batches(), n_folds=2, grid_size=3)


def test_a_changed_model_is_not_tuned():
    p = problem("mlp", "classification")
    la, data = fitted(p), validation(p)
    with torch.no_grad():
        p.model[0].bias.add_(1)
    with pytest.raises(StaleModelError):
        la.optimize_prior_precision("gridsearch", val_loader=data)


def test_single_precision_and_a_noise_for_each_output():
    p = problem("mlp", "regression")
    data = validation(p)
    double = fitted(p, "kron", sigma_noise=torch.tensor([0.5, 1.0, 2.0]))
    expected = double.optimize_prior_precision("gridsearch", val_loader=data, grid_size=5)
    single = Laplace(
        copy.deepcopy(p.model).float(), "regression", "all", "kron", sigma_noise=double.sigma_noise
    )
    single.fit([(x.float(), y.float()) for x, y in p.batches()])
    found = single.optimize_prior_precision(
        "gridsearch", val_loader=[(x.float(), y.float()) for x, y in data], grid_size=5
    )
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=0)


WITHOUT_A_BASIS = {
    "lowrank": ("lowrank", {}),
    "a mixture": ("kron-lowrank", {}),
    "damped": ("kron", {"damping": True}),
    "functions": ("gp", {}),
}


@pytest.mark.parametrize(("pred_type", "held"), [("glm", 0), ("glm", 2**20), ("nn", 0)])
@pytest.mark.parametrize("name", WITHOUT_A_BASIS)
def test_a_posterior_without_a_basis_is_factored_once_for_each_precision(name, pred_type, held, monkeypatch):
    if name == "functions" and pred_type == "nn":
        pred_type = "gp"  # a posterior over functions draws no weights
    p = problem("mlp", "classification")
    structure, options = WITHOUT_A_BASIS[name]
    la, data = fitted(p, structure, **options), validation(p)
    monkeypatch.setattr(held_out, "KEPT_BUDGET", 0)
    monkeypatch.setattr(held_out, "HELD_BUDGET", held)
    made, posterior = [], Curvature.posterior
    monkeypatch.setattr(Curvature, "posterior", lambda self, *args: made.append(1) or posterior(self, *args))
    request = {"pred_type": pred_type, "link_approx": "probit" if pred_type == "nn" else "mc", "n_samples": 4}
    found = la.optimize_prior_precision(
        "gridsearch", val_loader=data, grid_size=3, generator=torch.Generator().manual_seed(5), **request
    )
    each_piece_by_itself = pred_type != "nn" and held == 0
    assert len(made) == 3 * (len(data) if each_piece_by_itself else 1)
    made.clear()
    found_by_brent = la.optimize_prior_precision("brent", val_loader=data, tolerance=1.0)
    assert len(made) == len(found_by_brent.precisions)
    for delta, score in zip(found.precisions, found.scores, strict=True):
        la.prior_precision, generator, total = float(delta), torch.Generator().manual_seed(5), 0.0
        for x, y in data:
            total -= float(la(x, generator=generator, **request).log().gather(1, y[:, None]).sum())
        assert float(score) == pytest.approx(total / 7, rel=1e-12)
