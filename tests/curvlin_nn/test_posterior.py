"""What a fitted `Laplace` says of its posterior and of the terms of its evidence, against dense Gaussians."""

from __future__ import annotations

import pytest
import torch
from networks import problem
from torch import Tensor

from curvlin import Diagonal
from curvlin_nn import Laplace
from curvlin_nn.errors import UnsupportedError


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_evidence_is_the_sum_of_its_named_terms(structure):
    p = problem("mlp", "regression")
    la = Laplace(
        p.model, "regression", "all", structure, prior_precision=0.7, prior_mean=0.1, sigma_noise=0.6
    )
    la.fit(p.batches())
    total = la.log_likelihood - (la.log_det_ratio + la.scatter) / 2
    torch.testing.assert_close(total, la.log_marginal_likelihood(), rtol=1e-14, atol=0)
    ratio = la.log_det_posterior_precision - la.log_det_prior_precision
    torch.testing.assert_close(la.log_det_ratio, ratio, rtol=1e-12, atol=0)
    targets = torch.distributions.Normal(p.model(p.x).detach(), 0.6)
    torch.testing.assert_close(la.log_likelihood, targets.log_prob(p.y).sum(), rtol=1e-12, atol=0)


def test_named_terms_are_differentiable_in_what_is_set():
    p = problem("mlp", "regression")
    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    la = Laplace(p.model, "regression", "all", "kron", prior_precision=delta, sigma_noise=sigma).fit(
        p.batches()
    )
    total = la.log_likelihood - (la.log_det_ratio + la.scatter) / 2
    found = torch.autograd.grad(total, (delta, sigma))
    expected = torch.autograd.grad(la.log_marginal_likelihood(), (delta, sigma))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(la.log_det_prior_precision, delta)
    assert float(slope) == pytest.approx(la.n_params / 0.7, rel=1e-12)


def settled(structure: str, **options) -> Laplace:
    p = problem("mlp", "regression")
    return Laplace(p.model, "regression", "all", structure, prior_precision=0.7, **options).fit(p.batches())


def gaussian(la: Laplace) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(la.mean, precision_matrix=la.posterior_precision.to_dense())


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "ekfac", "lowrank", "block"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_densities_are_those_of_the_dense_gaussian(structure, shape):
    la = settled(structure)
    value = la.mean + 0.3 * torch.randn(*shape, la.n_params).double()
    q = gaussian(la)
    torch.testing.assert_close(la.log_prob(value), q.log_prob(value), rtol=1e-10, atol=0)
    delta = value - la.mean
    quadratic = (delta @ q.precision_matrix * delta).sum(-1)
    torch.testing.assert_close(la.square_norm(value), quadratic, rtol=1e-10, atol=0)
    torch.testing.assert_close(la.log_prob(value, normalized=False), -quadratic / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_densities_of_a_subnetwork_are_of_its_coordinates(structure):
    """Of vectors of all parameters, as they are drawn."""
    indices = torch.tensor([3, 5, 12, 40, 41, 70])
    p = problem("mlp", "regression")
    la = Laplace(p.model, "regression", "subnetwork", structure, subnetwork_indices=indices).fit(p.batches())
    draws = la.sample(4)
    q = torch.distributions.MultivariateNormal(
        la.mean[indices], precision_matrix=la.posterior_precision.to_dense()
    )
    torch.testing.assert_close(la.log_prob(draws), q.log_prob(draws[:, indices]), rtol=1e-10, atol=0)
    assert float(la.square_norm(la.mean)) == 0


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "ekfac", "lowrank", "block"])
def test_variances_are_the_diagonal_of_the_covariance(structure):
    la = settled(structure)
    torch.testing.assert_close(la.posterior_variance, gaussian(la).variance, rtol=1e-10, atol=0)


def test_covariance_and_scale_of_the_full_structure():
    la = settled("full")
    q = gaussian(la)
    torch.testing.assert_close(la.posterior_covariance, q.covariance_matrix, rtol=1e-9, atol=1e-13)
    assert torch.equal(la.posterior_covariance, la.posterior_covariance.mT)
    torch.testing.assert_close(la.posterior_scale, q.scale_tril, rtol=1e-9, atol=1e-13)


def test_covariance_and_scale_keep_a_small_prior_in_single_precision():
    """The covariance is that of float64, rounded: its largest entries are one over the prior precision."""
    p = problem("mlp", "regression", n=4)
    batches = [(x.float(), y.float()) for x, y in p.batches()]
    la = Laplace(p.model.float(), "regression", "all", "full", prior_precision=1e-8).fit(batches)
    exact = Laplace(p.model.double(), "regression", "all", "full", prior_precision=1e-8)
    exact.fit([(x.double(), y.double()) for x, y in batches])
    p.model.float()
    for name in ("posterior_covariance", "posterior_scale"):
        found, expected = getattr(la, name), getattr(exact, name)
        assert found.dtype == torch.float32
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-3
    S = la.posterior_scale
    torch.testing.assert_close(S @ S.mT, la.posterior_covariance, rtol=1e-4, atol=1e2)
    assert torch.equal(S, S.tril())


def test_scale_of_the_diagonal_structure():
    la = settled("diag")
    torch.testing.assert_close(la.posterior_scale, gaussian(la).stddev, rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "lowrank", "block"])
def test_dense_matrices_are_not_made_of_structures(structure):
    la = settled(structure)
    with pytest.raises(
        UnsupportedError, match=r"posterior_covariance needs .*'full', found a .*posterior_variance"
    ):
        _ = la.posterior_covariance
    with pytest.raises(
        UnsupportedError, match=r"posterior_scale needs .*'full' or 'diag', found a .*unwhiten"
    ):
        _ = la.posterior_scale


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_answers_have_the_dtype_of_the_model(structure):
    p = problem("mlp", "regression")
    batches = [(x.float(), y.float()) for x, y in p.batches()]
    la = Laplace(p.model.float(), "regression", "all", structure, prior_precision=0.7).fit(batches)
    exact = settled(structure)
    value = la.mean + 0.1
    for found, expected in [
        (la.posterior_variance, exact.posterior_variance),
        (la.prior_precision_diag, exact.prior_precision_diag),
        (la.square_norm(value), exact.square_norm(value.double())),
        (la.log_prob(value), exact.log_prob(value.double())),
    ]:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    assert la.log_det_ratio.dtype == la.scatter.dtype == la.log_likelihood.dtype == torch.float64


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (0.7, lambda sizes: torch.full((sum(sizes),), 0.7, dtype=torch.float64)),
        (torch.arange(1.0, 7), lambda sizes: torch.arange(1.0, 7).repeat_interleave(torch.tensor(sizes))),
        (torch.arange(1.0, 84), lambda sizes: torch.arange(1.0, 84)),
        (Diagonal(torch.arange(1.0, 84).double()), lambda sizes: torch.arange(1.0, 84)),
    ],
    ids=["number", "by tensor", "by parameter", "operator"],
)
def test_the_diagonal_of_the_prior_precision(prior, expected):
    p = problem("mlp", "regression")
    prior = prior.double() if isinstance(prior, Tensor) else prior
    la = Laplace(p.model, "regression", "all", "diag", prior_precision=prior).fit(p.batches())
    sizes = [q.numel() for q in p.model.parameters()]
    torch.testing.assert_close(la.prior_precision_diag, expected(sizes).double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(1).double(), ValueError, r"value must have shape \(..., 83\), found \(1,\)"),
        (torch.zeros(83, 1).double(), ValueError, r"value must have shape \(..., 83\), found \(83, 1\)"),
        (torch.tensor(0.0).double(), ValueError, "value"),
        (torch.zeros(83), TypeError, "value .*float32"),
        (torch.zeros(83, dtype=torch.long), TypeError, "value"),
        ([0.0] * 83, TypeError, "value"),
    ],
)
@pytest.mark.parametrize("method", ["log_prob", "square_norm"])
def test_values_that_are_no_parameters_are_refused(value, error, message, method):
    with pytest.raises(error, match=message):
        getattr(settled("diag"), method)(value)
