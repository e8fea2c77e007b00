"""Priors in the form of the curvature: projections with their error, and posteriors as the next prior."""

import itertools

import network_oracle as oracle
import pytest
import torch
from networks import ADDITIVE, problem

from curvlin import Dense, Diagonal, Isotropic, KroneckerSum, NotClosedError
from curvlin_nn import Laplace, project_prior
from curvlin_nn.errors import UnsupportedError


def fitted(p, choice, batches=None, **options):
    return Laplace(p.model, p.likelihood, "all", choice, **options).fit(batches or p.batches())


@pytest.mark.parametrize("choice", ADDITIVE)
def test_a_fit_that_goes_on_is_one_fit_of_all_data(choice):
    p = problem("mlp", "regression", n=9)
    whole = fitted(p, ADDITIVE[choice], sigma_noise=0.3)
    parts = fitted(p, ADDITIVE[choice], p.batches()[:1], sigma_noise=0.3)
    parts.fit(p.batches()[1:2], override=False).fit(p.batches()[2:], override=False)
    torch.testing.assert_close(
        parts.posterior_precision.to_dense(), whole.posterior_precision.to_dense(), rtol=1e-12, atol=1e-12
    )
    assert float(parts.log_marginal_likelihood()) == pytest.approx(
        float(whole.log_marginal_likelihood()), rel=1e-12
    )
    assert parts.n_data == whole.n_data == 9


@pytest.mark.parametrize("structure", ["full", "diag", "block"])
def test_a_posterior_is_the_next_prior(structure):
    """Two tasks one after the other are one task with both data, for curvatures that add up."""
    p = problem("mlp", "classification", n=9)
    first = fitted(p, structure, p.batches()[:2], prior_precision=0.7)
    second = fitted(
        p, structure, p.batches()[2:], prior_precision=first.posterior_precision, prior_mean=first.mean
    )
    whole = fitted(p, structure, prior_precision=0.7)
    torch.testing.assert_close(
        second.posterior_precision.to_dense(), whole.posterior_precision.to_dense(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(second(p.x_test), whole(p.x_test), rtol=1e-10, atol=0)
    assert float(second.projected_prior.relative_error) == 0


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("onto", ["kronecker", "isotropic"])
@pytest.mark.parametrize("given", ["diagonal", "posterior"])
def test_a_projected_prior_is_the_nearest_block_by_block_and_its_error_is_true(kind, onto, given):
    p = problem(kind, "classification", n=9)
    first = fitted(p, "kron", p.batches()[:2], prior_precision=0.7)
    P0 = first.posterior_precision
    if given == "diagonal":
        P0 = 0.1 + 5 * torch.rand(first.n_params, generator=torch.Generator().manual_seed(0)).double()
        with pytest.raises(NotClosedError, match="take prior_projection='kronecker' or 'isotropic'"):
            _ = fitted(p, "kron", prior_precision=P0).posterior_precision
    la = fitted(p, "kron", prior_precision=P0, prior_mean=0.1, prior_projection=onto)
    dense = torch.diag(P0) if given == "diagonal" else P0.to_dense()
    expected = dense.clone()
    for block, index in zip(la.curvature.blocks, la.curvature.indices.blocks, strict=True):
        if isinstance(block, KroneckerSum):
            grid = torch.meshgrid(index, index, indexing="ij")
            nearest = nearest_product if onto == "kronecker" else nearest_multiple
            expected[grid] = nearest(dense[grid], block.sizes)
    found = la.projected_prior
    torch.testing.assert_close(found.operator.to_dense(), expected, rtol=1e-10, atol=1e-12)
    error = (dense - expected).norm() / dense.norm()
    assert 1e-3 < float(error) < 1
    assert float(found.relative_error) == pytest.approx(float(error), rel=1e-7)
    torch.testing.assert_close(
        la.posterior_precision.to_dense(), la.curvature.to_dense() + expected, rtol=1e-10, atol=1e-12
    )
    H = oracle.curvature(p.model, p.x, p.y, p.likelihood, "kron")
    with torch.no_grad():
        log_p = torch.distributions.Categorical(logits=p.model(p.x)).log_prob(p.y).sum()
    deviation = la.mean - 0.1
    ratio = torch.logdet(H + expected) - torch.logdet(expected)
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(log_p - deviation @ expected @ deviation / 2 - ratio / 2), rel=1e-9
    )


def nearest_product(M, sizes):
    """By the singular vectors of the rearranged dense matrix (Van Loan & Pitsianis)."""
    a, b = sizes
    U, s, Vh = torch.linalg.svd(M.view(a, b, a, b).permute(0, 2, 1, 3).reshape(a * a, b * b))
    return s[0] * torch.kron(U[:, 0].view(a, a), Vh[0].view(b, b))


def nearest_multiple(M, sizes):
    return M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype)


@pytest.mark.parametrize("onto", ["kronecker", "isotropic"])
def test_priors_that_fit_are_left_alone(onto):
    p = problem("mlp", "classification")
    for prior in (torch.tensor(0.3), torch.linspace(0.1, 2, 6), torch.linspace(0.1, 2, 3)):
        plain = fitted(p, "kron", prior_precision=prior)
        named = fitted(p, "kron", prior_precision=prior, prior_projection=onto)
        assert float(named.projected_prior.relative_error) == 0
        assert torch.equal(named.posterior_precision.to_dense(), plain.posterior_precision.to_dense())
        named.optimize_prior_precision(prior_structure="layerwise")


def test_couplings_between_blocks_are_left_out_and_counted():
    A = torch.randn(6, 6).double()
    P0 = Dense(A @ A.T + torch.eye(6))
    H = fitted(problem("mlp", "classification"), "kron").curvature
    two = H.with_blocks([Dense(torch.eye(b.size).double()) for b in H.blocks])
    full = Dense(torch.eye(H.size).double() + 0.1)
    found = project_prior(full, two)
    for index, (i, j) in enumerate(itertools.product(range(len(two.blocks)), repeat=2)):
        rows, columns = two.indices.blocks[i], two.indices.blocks[j]
        part = found.operator.to_dense()[rows][:, columns]
        assert torch.equal(part, full.to_dense()[rows][:, columns] * (i == j)), index
    error = (found.operator.to_dense() - full.to_dense()).norm() / full.to_dense().norm()
    assert float(found.relative_error) == pytest.approx(float(error), rel=1e-9)
    assert project_prior(P0, P0).operator is P0


def test_ekfac_takes_multiples_of_the_identity_only():
    p = problem("mlp", "classification")
    prior = torch.linspace(0.1, 2, fitted(p, "diag").n_params).double()
    la = fitted(p, "ekfac", prior_precision=prior, prior_projection="isotropic")
    assert 0 < float(la.projected_prior.relative_error) < 1
    with pytest.raises(UnsupportedError, match="does not serve a curvature in a fixed eigenbasis"):
        fitted(p, "ekfac", prior_precision=prior, prior_projection="kronecker")
    with pytest.raises(
        UnsupportedError, match="prior_projection='diag' is not supported; expected one of 'kronecker'"
    ):
        Laplace(p.model, "classification", prior_projection="diag")


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_gradients_in_mean_and_temperature_are_exact(structure):
    p = problem("mlp", "regression", n=6, n_outputs=2)
    la = fitted(p, structure, prior_projection="kronecker")
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.5, 0.1, 0.7)]
    direction = torch.linspace(-1, 1, la.n_params).double()

    def at(slope, sigma, scale, temperature):
        return (slope * direction).exp(), sigma, scale * direction, temperature

    def value(*hyperparameters):
        prior, sigma, mean, temperature = at(*hyperparameters)
        return la.log_marginal_likelihood(prior, sigma, prior_mean=mean, temperature=temperature)

    assert torch.autograd.gradcheck(value, leaves)
    expected = float(value(*leaves).detach())
    la.prior_precision, la.sigma_noise, la.prior_mean, la.temperature = (v.detach() for v in at(*leaves))
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-13)


def test_arguments_of_the_evidence_are_checked():
    la = fitted(problem("mlp", "regression"), "diag")
    with pytest.raises(ValueError, match="prior_mean must have"):
        la.log_marginal_likelihood(prior_mean=torch.zeros(3))
    with pytest.raises(ValueError, match="temperature must be positive and finite, found -1"):
        la.log_marginal_likelihood(temperature=-1.0)


def test_isotropic_and_diagonal_priors_are_exact_beside_dense_blocks():
    H = fitted(problem("mlp", "classification"), "block").curvature
    for P0 in (Isotropic(torch.tensor(2.0).double(), H.size), Diagonal(torch.rand(H.size).double() + 0.1)):
        found = project_prior(P0, H)
        assert float(found.relative_error) == 0
        assert torch.equal(found.operator.to_dense(), P0.to_dense())
