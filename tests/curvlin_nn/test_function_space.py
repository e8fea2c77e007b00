"""The dual form over kept rows is the posterior over parameters: against the dense precision of per-sample autodiff."""

import functools

import network_oracle as oracle
import pytest
import torch
from networks import Sequences, Tied, problem

import curvlin_nn.columns
from curvlin import Woodbury
from curvlin_nn import Laplace, structures
from curvlin_nn.errors import UnsupportedError

LOSSES = {"classification": oracle.cross_entropy, "regression": oracle.half_squared_error}


def dense_curvature(p):
    return oracle.ggn(p.model, p.x, p.y, LOSSES[p.likelihood])


def fitted(p, choice="gp", **options):
    return Laplace(p.model, p.likelihood, "all", choice, **options).fit(p.batches())


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_predictions_and_evidence_are_those_of_the_full_posterior(kind, likelihood):
    p = problem(kind, likelihood)
    la = fitted(p, prior_precision=0.5)
    assert isinstance(la.posterior_precision, Woodbury)
    H = dense_curvature(p)
    prior = torch.full((la.n_params,), 0.5).double()
    expected = oracle.covariance(p.model, p.x_test, H + torch.diag(prior))
    _, joint = la._predictive().joint(p.x_test)
    torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-11 * float(expected.norm()))
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior), rel=1e-10
    )
    full = fitted(p, "full", prior_precision=0.5)
    torch.testing.assert_close(la(p.x_test), full(p.x_test), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        la.optimize_prior_precision().prior_precision, full.optimize_prior_precision().prior_precision
    )


@pytest.mark.parametrize("structure", ["layerwise", "diag"])
def test_priors_of_parts_are_those_of_the_full_posterior(structure):
    p = problem("mlp", "classification")
    size = 6 if structure == "layerwise" else sum(q.numel() for q in p.model.parameters())
    prior = torch.linspace(0.3, 1.2, size).double()
    la, full = fitted(p, prior_precision=prior), fitted(p, "full", prior_precision=prior)
    torch.testing.assert_close(la(p.x_test), full(p.x_test), rtol=1e-9, atol=1e-12)
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(full.log_marginal_likelihood()), rel=1e-10
    )


def test_shared_positions_and_tied_weights():
    torch.manual_seed(0)
    sequences, tokens = torch.randn(6, 3, 4).double(), torch.randint(5, (6, 4))
    cases = [
        (Sequences().double(), "regression", sequences, torch.randn(6, 2).double()),
        (Tied().double(), "classification", tokens, tokens.roll(1, 1)),
    ]
    for model, likelihood, x, y in cases:
        batches = [(x[:4], y[:4]), (x[4:], y[4:])]
        found, expected = (
            Laplace(model, likelihood, "all", choice, prior_precision=0.7).fit(batches)
            for choice in ("gp", "full")
        )
        torch.testing.assert_close(
            found.curvature.to_dense(), expected.curvature.to_dense(), rtol=1e-9, atol=1e-10
        )
        for mine, theirs in zip(
            found._predictive().mean_and_covariance(x),
            expected._predictive().mean_and_covariance(x),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_columns_that_come_some_at_a_time_and_sequences_of_several_lengths(monkeypatch):
    torch.manual_seed(1)
    model, tokens = Tied().double(), torch.randint(5, (5, 4))
    batches = [(tokens[:3, :3], tokens[:3, 1:]), (tokens[3:], tokens[3:].roll(1, 1))]
    full = Laplace(model, "classification", "all", "full").fit(batches)
    monkeypatch.setattr(curvlin_nn.columns, "COLUMN_BUDGET", 1)
    la = Laplace(model, "classification", "all", "gp").fit(batches)
    expected = full.curvature.to_dense()
    torch.testing.assert_close(la.curvature.to_dense(), expected, rtol=1e-9, atol=1e-11)
    subset = functools.partial(
        structures.FunctionSpace, n_subset=5, generator=torch.Generator().manual_seed(0)
    )
    la = Laplace(model, "classification", "all", subset).fit(batches)
    torch.testing.assert_close(la.curvature.to_dense(), expected, rtol=1e-9, atol=1e-11)


def test_a_subset_is_a_fit_of_it_and_takes_every_sample_as_often(monkeypatch):
    p = problem("mlp", "regression")
    alone = torch.stack(
        [fitted_on(p, "full", slice(n, n + 1)).curvature.to_dense().flatten() for n in range(8)]
    )
    monkeypatch.setattr(curvlin_nn.columns, "COLUMN_BUDGET", 1)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(8).double()
    subset = functools.partial(structures.FunctionSpace, n_subset=3, generator=generator)
    for _ in range(100):
        la = fitted(p, subset)
        assert la.posterior_precision.rank == 3 * 3
        H = la.curvature.to_dense().flatten()
        chosen = torch.linalg.lstsq(alone.mT, H[:, None]).solution.squeeze(1)
        torch.testing.assert_close(chosen, chosen.round(), rtol=0, atol=1e-8)
        assert chosen.round().sum() == 3 and chosen.round().max() == 1
        counts += chosen.round()
    z = (counts - 100 * 3 / 8) / (100 * 3 / 8 * 5 / 8) ** 0.5
    assert z.abs().max() < 4


def fitted_on(p, choice, samples):
    return Laplace(p.model, p.likelihood, "all", choice).fit([(p.x[samples], p.y[samples])])


def test_a_fit_that_continues_is_the_fit_of_all_data():
    p = problem("cnn", "classification")
    la = Laplace(p.model, p.likelihood, "all", "gp").fit(p.batches()[:1]).fit(p.batches()[1:], override=False)
    torch.testing.assert_close(la(p.x_test), fitted(p)(p.x_test), rtol=1e-10, atol=1e-12)
    other = structures.FunctionSpace(la.parameters, n_subset=3)
    with pytest.raises(UnsupportedError, match="n_subset"):
        other.check_merge(structures.FunctionSpace(la.parameters))


def test_training_data_are_not_visited_again():
    p = problem("mlp", "regression")
    batches = iter(p.batches())
    la = Laplace(p.model, p.likelihood, "all", "gp").fit(batches)
    assert next(batches, None) is None
    la(p.x_test), la.log_marginal_likelihood(), la.sample(2)


def test_draws_have_the_covariance_of_the_dense_posterior():
    p = problem("mlp", "regression")
    la = fitted(p, prior_precision=0.5)
    covariance = torch.linalg.inv(dense_curvature(p) + 0.5 * torch.eye(la.n_params).double())
    root = la.posterior_precision.unwhiten(torch.eye(la.n_params).double())
    torch.testing.assert_close(root.mT @ root, covariance, rtol=1e-9, atol=1e-10 * float(covariance.norm()))
