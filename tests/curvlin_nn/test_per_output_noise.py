"""One noise scale for each output: KFAC, full, block and diagonal curvatures at that noise, without another fit."""

import functools

import pytest
import torch
from networks import ADDITIVE, Faint, Tied, problem
from scipy.optimize import minimize
from torch import nn

from curvlin_nn import Laplace, likelihoods
from curvlin_nn.capture import graph
from curvlin_nn.errors import NoFiniteOptimumError, UnsupportedError

SIGMA = torch.tensor([0.3, 0.8, 1.7], dtype=torch.float64)


def fitted(p, choice, likelihood="regression", **options):
    return Laplace(p.model, likelihood, "all", choice, **options).fit(p.batches())


@pytest.mark.parametrize("choice", ADDITIVE)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_it_is_the_likelihood_with_these_variances(kind, choice):
    """Set after the fit; the other likelihood has the variances in its columns from the start."""
    p = problem(kind, "regression")
    structure = {"0": "full", "*": "kron"} if (kind, choice) == ("cnn", "mixed") else ADDITIVE[choice]
    options = {"prior_precision": 0.6, "temperature": 0.4}
    la = fitted(p, structure, sigma_noise=torch.ones(3), **options)
    la.sigma_noise = SIGMA
    expected = fitted(p, structure, likelihoods.Gaussian(variances=SIGMA.square()), **options)
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(la.posterior_precision.to_dense(), expected.posterior_precision.to_dense())
    close(la.log_marginal_likelihood(), expected.log_marginal_likelihood())
    for arguments in ({}, {"joint": True}, {"diagonal_output": True}):
        for a, b in zip(
            la(p.x_test, observation_noise=True, **arguments),
            expected(p.x_test, observation_noise=True, **arguments),
            strict=True,
        ):
            close(a, b)
    plain = fitted(p, structure, **options)
    close(la.curvature.to_dense(), plain.curvature.to_dense())
    la.sigma_noise = plain.sigma_noise = 0.7  # and back to one for all
    close(la.posterior_precision.to_dense(), plain.posterior_precision.to_dense())


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("budget", [1, 600])  # one column of a batch at a time, or two of three
def test_columns_may_come_some_at_a_time(monkeypatch, structure, budget):
    p = problem("cnn", "regression")
    whole = fitted(p, structure, sigma_noise=SIGMA)
    monkeypatch.setattr(graph, "COLUMN_BUDGET", budget)
    parts = fitted(p, structure, sigma_noise=SIGMA)
    for found, expected in zip(parts._fit.curvature.outputs, whole._fit.curvature.outputs, strict=True):
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-12)


def test_outputs_of_several_terms_share_the_noise_of_the_last_axis():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 2).double()
    sigma = SIGMA[:2]
    la = Laplace(model, "regression", "all", "kron", sigma_noise=sigma).fit([(x[:3], y[:3]), (x[3:], y[3:])])
    other = Laplace(model, likelihoods.Gaussian(variances=sigma.square()), "all", "kron").fit([(x, y)])
    torch.testing.assert_close(
        la.posterior_precision.to_dense(), other.posterior_precision.to_dense(), rtol=1e-10, atol=1e-12
    )
    for a, b in zip(la(x, observation_noise=True), other(x, observation_noise=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_gradients_are_exact(structure):
    p = problem("mlp", "regression", n=6)
    la = fitted(p, structure, sigma_noise=SIGMA)
    prior = torch.linspace(0.3, 1.5, 6).double().requires_grad_()
    sigma = SIGMA.clone().requires_grad_()
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, sigma))


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_all_noise_scales_are_found_together_with_the_prior(structure, start):
    p = problem("mlp", "regression", n=12)
    y = p.y * torch.tensor([0.2, 1.0, 4.0])
    la = Laplace(p.model, "regression", "all", structure, sigma_noise=SIGMA * start, prior_precision=start)
    la.fit([(p.x, y)])
    found = la.optimize_prior_precision(optimize_noise=True)

    def loss(u):
        v = torch.tensor(u, requires_grad=True)
        value = -la.log_marginal_likelihood(v[0].exp(), (v[1:] / 2).exp())
        (gradient,) = torch.autograd.grad(value, v)
        return float(value.detach()), gradient.numpy()

    best = minimize(loss, torch.zeros(4).double().numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
    assert float(la.prior_precision.log()) == pytest.approx(best.x[0], abs=1e-5)
    torch.testing.assert_close(la.sigma_noise, (torch.tensor(best.x[1:]) / 2).exp(), rtol=1e-5, atol=0)
    assert found.gradient_norm < 1e-7
    assert found.log_marginal_likelihood == pytest.approx(-best.fun, rel=1e-12)
    assert float(la.sigma_noise[2]) > 3 * float(la.sigma_noise[0])


@pytest.mark.parametrize("influence", [1e-17, 1e-20])
def test_parameters_without_influence_do_not_stop_the_search(influence):
    p = problem("mlp", "regression", n=12)
    model = Faint(influence).double()
    la = Laplace(model, "regression", "all", "diag", sigma_noise=torch.ones(3)).fit([(p.x, p.y)])
    la.optimize_prior_precision(prior_structure="diag", optimize_noise=True)
    other = Laplace(model, "regression", ["layer"], "diag", sigma_noise=torch.ones(3)).fit([(p.x, p.y)])
    other.optimize_prior_precision(prior_structure="diag", optimize_noise=True)
    torch.testing.assert_close(la.sigma_noise, other.sigma_noise, rtol=1e-6, atol=0)
    torch.testing.assert_close(la.prior_precision[2:], other.prior_precision, rtol=1e-6, atol=0)


def test_the_prior_alone_is_found_at_fixed_noise():
    p = problem("mlp", "regression", n=12)
    la = fitted(p, "kron", sigma_noise=SIGMA)
    other = fitted(p, "kron", likelihoods.Gaussian(variances=SIGMA.square()))
    for la_ in (la, other):
        la_.optimize_prior_precision(prior_structure="layerwise")
    torch.testing.assert_close(la.prior_precision, other.prior_precision, rtol=1e-7, atol=0)
    assert torch.equal(la.sigma_noise, SIGMA)


def test_fits_merge_and_samples_have_the_noise_of_their_output():
    p = problem("mlp", "regression", n=9)
    la = Laplace(p.model, "regression", "all", "kron", sigma_noise=SIGMA).fit(p.batches()[:1])
    la.fit(p.batches()[1:], override=False)
    whole = fitted(p, "kron", sigma_noise=SIGMA)
    torch.testing.assert_close(
        la.posterior_precision.to_dense(), whole.posterior_precision.to_dense(), rtol=1e-12, atol=1e-12
    )
    la.sigma_noise = 2.0
    la.fit(p.batches(), override=False)  # still by output
    la.sigma_noise = SIGMA
    n = 4000
    with_noise = la.predictive_samples(p.x_test, n, torch.Generator().manual_seed(0), observation_noise=True)
    without = la.predictive_samples(p.x_test, n, torch.Generator().manual_seed(0))
    noise = (with_noise - without).flatten(0, 1)
    z = (noise.square().mean(0) / SIGMA.square() - 1) * (len(noise) / 2) ** 0.5
    assert bool((z.abs() < 4).all())


def test_what_cannot_have_it_says_so():
    p = problem("mlp", "regression")
    for structure in ("ekfac", "lowrank", "kfoc"):
        with pytest.raises(
            UnsupportedError, match="is not served with one sigma_noise for each output, expected"
        ):
            fitted(p, structure, sigma_noise=SIGMA)
    with pytest.raises(UnsupportedError, match="is served for curvature='ggn' only"):
        fitted(p, "kron", sigma_noise=SIGMA, curvature="fisher_mc")
    with pytest.raises(UnsupportedError, match="sigma_noise must be one number for regression"):
        fitted(p, "kron", likelihoods.Gaussian(covariance=torch.eye(3).double()), sigma_noise=SIGMA)
    with pytest.raises(ValueError, match="sigma_noise must be positive and finite, found -1"):
        fitted(p, "kron", sigma_noise=-SIGMA / SIGMA)
    with pytest.raises(ValueError, match="sigma_noise must have 3 entries, one for each output, found 2"):
        fitted(p, "full", sigma_noise=SIGMA[:2])
    la = fitted(p, "kron")
    for use in (lambda: setattr(la, "sigma_noise", SIGMA), lambda: la.log_marginal_likelihood(1.0, SIGMA)):
        with pytest.raises(UnsupportedError, match="the curvature of each output was not kept"):
            use()
    assert float(la.sigma_noise) == 1
    tied, tokens = Tied().double(), torch.randint(5, (4, 3))
    with pytest.raises(UnsupportedError, match=r"'embed.weight' is used both as it is and transposed"):
        Laplace(tied, "regression", "all", "kron", sigma_noise=torch.ones(5)).fit(
            [(tokens, torch.randn(4, 3, 5).double())]
        )


def test_an_output_without_residuals_has_no_best_noise():
    p = problem("mlp", "regression")
    y = p.y.clone()
    y[:, 1] = p.model(p.x).detach()[:, 1]
    la = Laplace(p.model, "regression", "all", "kron", sigma_noise=SIGMA).fit([(p.x, y)])
    with pytest.raises(NoFiniteOptimumError, match="the residuals of output 1 are all zero"):
        la.optimize_prior_precision(optimize_noise=True)
