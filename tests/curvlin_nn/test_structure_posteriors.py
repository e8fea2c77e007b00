"""Posteriors over every structure: predictions, evidence and layerwise priors against dense algebra."""

import functools

import network_oracle as oracle
import pytest
import torch
from networks import Tied, problem
from torch import nn

from curvlin_nn import Laplace, structures
from curvlin_nn.errors import UnsupportedError

CHOICES = {
    "ekfac": "ekfac",
    "reduce": functools.partial(structures.Kronecker, approximation="reduce"),
    "block": "block",
    "block by module": functools.partial(structures.Block, by_module=True),
    "mixed": {"0": "full", "2*": "kron", "*": "ekfac"},
    "mixed out of order": {"*.weight": "diag", "*": "full"},
}


def fitted(p, choice, **options):
    return Laplace(p.model, p.likelihood, "all", choice, **options).fit(p.batches())


def dense_posterior(la, precisions):
    return la.curvature.to_dense() + torch.diag(precisions)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_predictive_covariances_are_those_of_the_dense_precision(kind, choice):
    p = problem(kind, "regression")
    la = fitted(p, CHOICES[choice], prior_precision=0.5)
    P = dense_posterior(la, torch.full((la.n_params,), 0.5).double())
    expected = oracle.covariance(p.model, p.x_test, P)
    _, joint = la(p.x_test, joint=True)
    torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-11 * float(expected.norm()))
    _, covariance = la(p.x_test)
    own = expected.view(5, 3, 5, 3)[range(5), :, range(5)]
    torch.testing.assert_close(covariance, own, rtol=1e-9, atol=1e-11 * float(own.norm()))
    _, variance = la(p.x_test, diagonal_output=True)
    torch.testing.assert_close(variance, own.diagonal(dim1=1, dim2=2), rtol=1e-9, atol=0)


def test_predictions_with_an_embedding_in_an_exact_block():
    """Its block stands in the order of the flat vector, its features as (features, tokens)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.randint(5, (7, 2)), torch.randn(7, 2).double()
    la = Laplace(model, "regression", "all", "block", prior_precision=0.25).fit([(x, y)])
    P = dense_posterior(la, torch.full((la.n_params,), 0.25).double())
    expected = oracle.covariance(model, x, P)
    _, joint = la(x, joint=True)
    torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-11 * float(expected.norm()))


@pytest.mark.parametrize("structure", ["layerwise", "modulewise"])
@pytest.mark.parametrize("choice", CHOICES)
def test_evidence_and_predictions_under_priors_by_layer_are_those_of_the_dense_precision(choice, structure):
    p = problem("mlp", "classification")
    values = torch.linspace(0.3, 1.2, 6 if structure == "layerwise" else 3).double()
    la = fitted(p, CHOICES[choice], prior_precision=values)
    per_parameter = values if structure == "layerwise" else values.repeat_interleave(2)
    prior = torch.cat(
        [value.expand(q.numel()) for value, q in zip(per_parameter, p.model.parameters(), strict=True)]
    )
    H = la.curvature.to_dense()
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    covariance = oracle.covariance(p.model, p.x_test, H + torch.diag(prior)).view(5, 3, 5, 3)
    variance = covariance[range(5), :, range(5)].diagonal(dim1=1, dim2=2)
    with torch.no_grad():
        probabilities = oracle.probit(p.model(p.x_test), variance)
    torch.testing.assert_close(la(p.x_test), probabilities, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_optimal_prior_precision_is_a_stationary_point_of_the_dense_evidence(choice):
    p = problem("mlp", "regression")
    la = fitted(p, CHOICES[choice])
    optimum = la.optimize_prior_precision()
    H, n = la.curvature.to_dense(), la.n_params

    def evidence(log_precision):
        prior = torch.full((n,), float(torch.tensor(log_precision).exp())).double()
        return oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)

    top = float(optimum.prior_precision.log())
    assert float(optimum.log_marginal_likelihood) == pytest.approx(evidence(top), rel=1e-6)
    slope = (evidence(top + 1e-4) - evidence(top - 1e-4)) / 2e-4
    bend = (evidence(top + 1e-2) - 2 * evidence(top) + evidence(top - 1e-2)) / 1e-4
    assert bend < 0
    assert abs(slope) < 1e-4 * abs(bend)  # within 1e-4 of the maximum, in log precision


@pytest.mark.parametrize("choice", CHOICES)
def test_data_seen_twice_are_data_at_half_the_temperature(choice):
    p = problem("mlp", "classification")
    H = fitted(p, CHOICES[choice]).curvature.to_dense()
    twice = Laplace(p.model, p.likelihood, "all", CHOICES[choice]).fit(p.batches() * 2)
    torch.testing.assert_close(twice.curvature.to_dense(), 2 * H, rtol=1e-9, atol=1e-12 * float(H.norm()))


@pytest.mark.parametrize("choice", ["reduce", "block", "block by module", "mixed out of order"])
def test_a_fit_that_continues_is_the_fit_of_all_data(choice):
    p = problem("mlp", "classification")
    whole = fitted(p, CHOICES[choice])
    parts = Laplace(p.model, p.likelihood, "all", CHOICES[choice])
    parts.fit(p.batches()[:1]).fit(p.batches()[1:], override=False)
    H = whole.curvature.to_dense()
    torch.testing.assert_close(parts.curvature.to_dense(), H, rtol=1e-10, atol=1e-13 * float(H.norm()))
    assert float(parts.log_marginal_likelihood()) == pytest.approx(
        float(whole.log_marginal_likelihood()), rel=1e-11
    )


@pytest.mark.parametrize(
    "choice", ["full", "diag", "block", "kron", "ekfac", "kfoc", "kron-lowrank", "lowrank"]
)
def test_posteriors_of_a_tied_weight_are_those_of_the_dense_matrix(choice):
    torch.manual_seed(4)
    model = Tied().double()
    x, y = torch.randint(5, (6, 2)), torch.randn(6, 2, 5).double()
    la = Laplace(model, "regression", "all", choice, prior_precision=0.5).fit(
        [(x[:4], y[:4]), (x[4:], y[4:])]
    )
    P = dense_posterior(la, torch.full((la.n_params,), 0.5).double())
    J = oracle.jacobian_row_by_row(model, [(sample[None],) for sample in x]).flatten(0, 1)
    expected = J @ torch.linalg.inv(P) @ J.T
    _, joint = la(x, joint=True)
    torch.testing.assert_close(joint, expected, rtol=1e-8, atol=1e-10 * float(expected.norm()))
    complexity = torch.logdet(P) - len(P) * torch.tensor(0.5).double().log()
    theta, f = la.mean, model(x).detach()
    log_p = torch.distributions.Normal(f, 1.0).log_prob(y).sum()
    evidence = log_p - theta @ theta * 0.25 - complexity / 2
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(evidence), rel=1e-9)


SINGLE = {
    **CHOICES,
    "joint": functools.partial(structures.Kronecker, joint_bias=True),
    "joint ekfac": functools.partial(structures.EKFAC, joint_bias=True),
    "kfoc": "kfoc",
    "kron-lowrank": functools.partial(structures.KroneckerLowRank, rank=5),
}


@pytest.mark.parametrize("choice", SINGLE)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_predictions_in_float32_are_those_of_float64_to_its_rounding(kind, choice):
    """A prior far below the curvature, where factors of no full rank would show what rounding leaves in them."""
    p = problem(kind, "regression")
    variances = []
    for dtype in (torch.float64, torch.float32):
        model = p.model.to(dtype)
        la = Laplace(model, "regression", "all", SINGLE[choice], prior_precision=2.0**-10)
        la.fit([(x.to(dtype), y.to(dtype)) for x, y in p.batches()])
        variances.append(la(p.x_test.to(dtype), diagonal_output=True)[1].double())
    torch.testing.assert_close(variances[1], variances[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("choice", [name for name in SINGLE if name not in ("block by module", "mixed")])
def test_the_best_priors_by_layer_are_a_maximum_of_the_dense_evidence(choice):
    p = problem("mlp", "regression")
    la = fitted(p, SINGLE[choice])
    if choice in ("mixed out of order", "joint", "joint ekfac"):  # one block for several layers or parameters
        with pytest.raises(UnsupportedError, match="cuts through blocks"):
            la.optimize_prior_precision(prior_structure="layerwise")
        return
    optimum = la.optimize_prior_precision(prior_structure="layerwise")
    H, sizes = la.curvature.to_dense(), torch.tensor([q.numel() for q in p.model.parameters()])

    def evidence(values):
        prior = values.repeat_interleave(sizes)
        return oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)

    best = optimum.prior_precision.double()
    top = evidence(best)
    assert float(optimum.log_marginal_likelihood) == pytest.approx(top, rel=1e-9)
    for k in range(len(sizes)):
        for factor in (0.98, 1.02):
            assert evidence(best * torch.where(torch.arange(len(sizes)) == k, factor, 1.0)) < top
