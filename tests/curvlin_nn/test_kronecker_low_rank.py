"""The leading eigenvectors of Kronecker products, against those of the dense products."""

import functools

import network_oracle as oracle
import pytest
import torch
from networks import problem
from torch import nn

from curvlin_nn import Laplace, curvature, likelihoods, structures
from curvlin_nn.curvature import accumulate


def truncated(rank, **options):
    return functools.partial(structures.KroneckerLowRank, rank=rank, **options)


def weight_spans(model):
    """Of each weight, or of each group of a convolution."""
    start = 0
    for name, p in model.named_parameters():
        groups = getattr(model.get_submodule(name.rpartition(".")[0]), "groups", 1) if p.ndim > 1 else 0
        for group in range(groups):
            size = p.numel() // groups
            yield slice(start + group * size, start + (group + 1) * size)
        start += p.numel()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_best_approximation_of_each_product_is_kept(kind):
    p = problem(kind, "classification")
    kron = oracle.kfac(p.model, p.x, p.y, oracle.cross_entropy)
    found = curvature(p.model, p.likelihood, p.batches(), truncated(4)).to_dense()
    expected = kron.clone()
    for span in weight_spans(p.model):
        values, vectors = torch.linalg.eigh(kron[span, span])
        expected[span, span] = vectors[:, -4:] * values[-4:] @ vectors[:, -4:].T
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11 * float(kron.norm()))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_share_of_the_trace_that_is_kept_is_reported(kind):
    p = problem(kind, "classification")
    kron = oracle.kfac(p.model, p.x, p.y, oracle.cross_entropy)
    (state,) = accumulate(
        p.model, likelihoods.resolve(p.likelihood), p.batches(), "all", [truncated(3)]
    ).states
    kept = [truncation.kept_share for truncation in state.truncations() if truncation is not None]
    expected = []
    for span in weight_spans(p.model):
        values = torch.linalg.eigvalsh(kron[span, span])
        expected.append(float(values[-3:].sum() / values.sum()))
    assert kept == pytest.approx(expected, rel=1e-10)
    assert max(kept) < 1


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_at_full_rank_it_is_kfac(kind):
    p = problem(kind, "classification")
    kron = oracle.kfac(p.model, p.x, p.y, oracle.cross_entropy)
    found = curvature(p.model, p.likelihood, p.batches(), truncated(1000)).to_dense()
    torch.testing.assert_close(found, kron, rtol=1e-8, atol=1e-11 * float(kron.norm()))


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("joint_bias", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_evidence_and_predictions_are_those_of_the_dense_matrix(kind, joint_bias, structure):
    p = problem(kind, "regression")
    sizes = torch.tensor([q.numel() for q in p.model.parameters()])
    values = torch.linspace(0.3, 1.2, len(sizes)).double()
    values = values[:1] if structure == "scalar" else values
    la = Laplace(p.model, p.likelihood, "all", truncated(3, joint_bias=joint_bias), prior_precision=values)
    H = la.fit(p.batches()).curvature.to_dense()
    prior = values.expand(len(sizes)).repeat_interleave(sizes)
    expected = oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, prior)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-9)
    covariance = oracle.covariance(p.model, p.x_test, H + torch.diag(prior))
    _, joint = la(p.x_test, joint=True)
    torch.testing.assert_close(joint, covariance, rtol=1e-8, atol=1e-10 * float(covariance.norm()))


def test_the_best_prior_precision_is_a_maximum_of_the_dense_evidence():
    p = problem("mlp", "regression")
    la = Laplace(p.model, p.likelihood, "all", truncated(3)).fit(p.batches())
    optimum = la.optimize_prior_precision()
    H, best = la.curvature.to_dense(), optimum.prior_precision.double()

    def evidence(value):
        return oracle.log_marginal_likelihood(p.model, p.x, p.y, p.likelihood, H, value.expand(len(H)))

    assert float(optimum.log_marginal_likelihood) == pytest.approx(evidence(best), rel=1e-9)
    assert evidence(best) > max(evidence(best * 0.99), evidence(best * 1.01))


def test_draws_have_the_covariance_of_the_posterior():
    p = problem("mlp", "regression")
    la = Laplace(p.model, p.likelihood, "all", truncated(3), prior_precision=0.5).fit(p.batches())
    n = 4000
    draws = la.sample(n, torch.Generator().manual_seed(1)) - la.mean
    along = torch.linalg.eigh(la.curvature.to_dense()).eigenvectors[:, [0, 40, -2, -1]]
    expected = (along * torch.linalg.solve(la.posterior_precision.to_dense(), along)).sum(0)
    z = ((draws @ along).square().mean(0) / expected - 1) / (2 / n) ** 0.5
    assert float(z.abs().max()) < 4


def test_states_of_disjoint_data_merge():
    p = problem("mlp", "classification")
    whole = Laplace(p.model, p.likelihood, "all", truncated(3)).fit(p.batches())
    parts = Laplace(p.model, p.likelihood, "all", truncated(3)).fit(p.batches()[:1])
    parts.fit(p.batches()[1:], override=False)
    H = whole.curvature.to_dense()
    torch.testing.assert_close(parts.curvature.to_dense(), H, rtol=1e-9, atol=1e-12 * float(H.norm()))


def test_nothing_of_the_size_of_a_weight_times_the_rank_is_kept():
    model = nn.Linear(200, 300)
    data = [(torch.randn(64, 200), torch.randn(64, 300))]
    H = curvature(model, "regression", data, truncated(50))
    stored = sum(t.numel() for t, _ in H.blocks[0]._tensors())
    assert stored <= 50 * (200 + 300) + 1


def test_a_weight_without_influence_keeps_nothing():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    la = Laplace(Unused().double(), "regression", "all", truncated(3), prior_precision=0.5)
    x = torch.randn(4, 3).double()
    la.fit([(x, torch.randn(4, 2).double())])
    assert bool((la.curvature.to_dense()[8:] == 0).all())
    torch.testing.assert_close(la.posterior_precision.inverse_diagonal()[8:], torch.full((8,), 2.0).double())


def test_ranks_are_counted_from_one():
    p = problem("mlp", "classification")
    with pytest.raises(ValueError, match="rank"):
        curvature(p.model, p.likelihood, p.batches(), truncated(0))
