"""Posteriors over some coordinates: principal submatrices, in every structure, beside dense oracles."""

from __future__ import annotations

import functools
import math

import network_oracle as oracle
import pytest
import torch
from networks import Tied, assert_same, mlp, problem, state
from torch import Tensor, nn

from curvlin import BlockDiag, Dense, KroneckerSum
from curvlin.testing import forbid_dense
from curvlin_nn import Laplace, curvature
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.structures import Kronecker, LowRank
from curvlin_nn.subnetwork import Subnetwork

STRUCTURES = ("full", "diag", "kron", "ekfac", "block", "kfoc", "kron-lowrank", {"0": "full", "*": "kron"})
"""Those that are determined by H alone; "lowrank" is an approximation of the submatrix itself."""


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def coordinates(kind: str, size: int) -> Tensor:
    if kind == "scattered":
        return torch.randperm(size, generator=torch.Generator().manual_seed(3))[:17]
    return torch.arange(5, size - 4)  # whole parameters, and parts of the first and of the last


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("chosen", ["scattered", "range"])
@pytest.mark.parametrize(("kind", "likelihood"), [("mlp", "classification"), ("cnn", "regression")])
def test_posterior_is_that_of_the_principal_submatrix(kind, likelihood, chosen, structure):
    p = problem(kind, likelihood)
    index = coordinates(chosen, n_params(p.model))
    s, k = index.sort().values, len(index)
    before = state(p.model)
    la = Laplace(p.model, likelihood, "subnetwork", structure, subnetwork_indices=index, prior_precision=0.6)
    la.fit(p.batches())
    H = curvature(p.model, likelihood, p.batches(), structure).to_dense()[s[:, None], s]
    torch.testing.assert_close(la.curvature.to_dense(), H, rtol=1e-10, atol=1e-13)

    P = H + 0.6 * torch.eye(k).double()
    J = oracle.jacobian(p.model, p.x_test)[..., s]
    joint = J.flatten(0, 1) @ torch.linalg.inv(P) @ J.flatten(0, 1).T
    predictive = la._predictive()
    torch.testing.assert_close(predictive.joint(p.x_test)[1], joint, rtol=1e-9, atol=1e-12)
    per_sample = J @ torch.linalg.inv(P) @ J.mT
    torch.testing.assert_close(predictive.mean_and_covariance(p.x_test)[1], per_sample, rtol=1e-9, atol=1e-12)
    variance = per_sample.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(predictive.mean_and_variance(p.x_test)[1], variance, rtol=1e-9, atol=1e-12)

    theta = oracle.flat({n: q.detach() for n, q in p.model.named_parameters()})[s]
    with torch.no_grad():
        f = p.model(p.x)
    likely = torch.distributions.Categorical(logits=f) if likelihood == "classification" else None
    log_p = (likely or torch.distributions.Normal(f, 1.0)).log_prob(p.y).sum()
    ratio = torch.logdet(P) - k * math.log(0.6)
    torch.testing.assert_close(
        la.log_marginal_likelihood(), log_p - 0.3 * theta @ theta - ratio / 2, rtol=1e-9, atol=0
    )
    assert_same(before, state(p.model))


def test_full_curvature_equals_autodiff_of_single_samples():
    p = problem("cnn", "classification")
    index = coordinates("scattered", n_params(p.model)).sort().values
    la = Laplace(p.model, p.likelihood, "subnetwork", "full", subnetwork_indices=index).fit(p.batches())
    H = oracle.ggn(p.model, p.x, p.y, oracle.cross_entropy)[index[:, None], index]
    torch.testing.assert_close(la.curvature.to_dense(), H, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac"])
def test_all_coordinates_are_all_weights(structure):
    p = problem("mlp", "classification")
    every = torch.arange(n_params(p.model))
    whole = Laplace(p.model, p.likelihood, "all", structure).fit(p.batches())
    la = Laplace(p.model, p.likelihood, "subnetwork", structure, subnetwork_indices=every).fit(p.batches())
    torch.testing.assert_close(la(p.x_test), whole(p.x_test), rtol=1e-12, atol=0)
    found, expected = la.optimize_prior_precision(), whole.optimize_prior_precision()
    torch.testing.assert_close(found.prior_precision, expected.prior_precision, rtol=1e-9, atol=0)


def test_low_rank_is_that_of_the_submatrix():
    p = problem("mlp", "classification")
    index = coordinates("scattered", n_params(p.model)).sort().values
    H = curvature(p.model, p.likelihood, p.batches(), "full").to_dense()[index[:, None], index]

    def structure(space):
        return LowRank(space, rank=3, passes=8, generator=torch.Generator().manual_seed(0))

    la = Laplace(p.model, p.likelihood, "subnetwork", structure, subnetwork_indices=index).fit(p.batches())
    values, vectors = torch.linalg.eigh(H)
    best = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    torch.testing.assert_close(la.curvature.to_dense(), best, rtol=0, atol=1e-7 * float(values[-1]))


def test_only_the_subnetwork_varies_in_samples_and_by_its_covariance():
    p = problem("mlp", "regression")
    index = coordinates("scattered", n_params(p.model))
    la = Laplace(p.model, p.likelihood, "subnetwork", "full", subnetwork_indices=index).fit(p.batches())
    theta = nn.utils.parameters_to_vector(p.model.parameters()).detach()
    assert torch.equal(la.mean, theta)
    draws = la.sample(20_000, generator=torch.Generator().manual_seed(0))
    fixed = torch.ones(len(theta), dtype=torch.bool)
    fixed[index] = False
    assert torch.equal(draws[:, fixed], theta[fixed].expand(20_000, -1))
    s = index.sort().values
    assert torch.equal(la.subnetwork_indices, s)
    C = torch.linalg.inv(la.posterior_precision.to_dense())
    z_mean = (draws[:, s].mean(0) - theta[s]) / (C.diagonal() / 20_000).sqrt()
    z_variance = (draws[:, s].var(0) / C.diagonal() - 1) * (20_000 / 2) ** 0.5
    assert max(z_mean.abs().max(), z_variance.abs().max()) < 4
    assert (la.n_params, la.n_params_subnet) == (len(theta), len(index))
    torch.testing.assert_close(la.posterior.mean, theta[s], rtol=0, atol=0)
    with torch.no_grad():
        p.model[0].weight.add_(1.0)
    assert torch.equal(la.mean, theta)  # and draws, around what was fitted
    assert torch.equal(la.sample(3)[:, fixed], theta[fixed].expand(3, -1))
    assert la.parameters.unflatten(draws[:2])["4.weight"].shape == (2, *p.model[4].weight.shape)


def test_functional_samples_have_the_covariance_of_the_subnetwork():
    p = problem("mlp", "regression")
    index = coordinates("scattered", n_params(p.model))
    la = Laplace(p.model, p.likelihood, "subnetwork", "kron", subnetwork_indices=index).fit(p.batches())
    mean, covariance = la(p.x_test)
    f = la.functional_samples(p.x_test, 20_000, generator=torch.Generator().manual_seed(1))
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert ((f.mean(0) - mean) / (variance / 20_000).sqrt()).abs().max() < 4
    assert ((f.var(0) / variance - 1) * (20_000 / 2) ** 0.5).abs().max() < 4


def test_a_product_of_rows_and_columns_stays_one():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 6).double(), torch.randint(3, (7,))
    grid = (torch.tensor([0, 2, 3])[:, None] * 6 + torch.tensor([1, 4])).flatten()
    index = torch.cat([grid, torch.arange(35, 50)])  # and the whole second weight
    la = Laplace(model, "classification", "subnetwork", "kron", subnetwork_indices=index).fit([(x, y)])
    assert isinstance(la.curvature, BlockDiag)
    assert [type(block) for block in la.curvature.blocks] == [KroneckerSum, KroneckerSum]
    assert [block.sizes for block in la.curvature.blocks] == [(3, 2), (3, 5)]
    scattered = torch.tensor([0, 7, 9])
    la = Laplace(model, "classification", "subnetwork", "kron", subnetwork_indices=scattered).fit([(x, y)])
    assert isinstance(la.curvature, Dense)


def test_joint_products_of_weight_and_bias():
    p = problem("mlp", "classification")
    index = coordinates("range", n_params(p.model))

    def joint(space):
        return Kronecker(space, joint_bias=True)

    la = Laplace(p.model, p.likelihood, "subnetwork", joint, subnetwork_indices=index).fit(p.batches())
    H = curvature(p.model, p.likelihood, p.batches(), joint).to_dense()[index[:, None], index]
    torch.testing.assert_close(la.curvature.to_dense(), H, rtol=1e-10, atol=1e-13)
    J = oracle.jacobian(p.model, p.x_test)[..., index]
    covariance = J @ torch.linalg.inv(H + torch.eye(len(index)).double()) @ J.mT
    torch.testing.assert_close(
        la._predictive().mean_and_covariance(p.x_test)[1], covariance, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("structure", ["kron", "ekfac", "kfoc", "kron-lowrank", "joint bias"])
@pytest.mark.parametrize(
    "index",
    [
        torch.arange(24),
        torch.tensor([4, 6, 8, 10]),
        torch.tensor([5]),
        torch.tensor([0, 1, 2, 3, 24]),
    ],
    ids=["weight", "rows times columns", "one coordinate", "row and bias"],
)
def test_predictions_where_one_product_is_all_there_is(index, structure):
    p = problem("mlp", "regression")
    choice = functools.partial(Kronecker, joint_bias=True) if structure == "joint bias" else structure
    la = Laplace(p.model, p.likelihood, "subnetwork", choice, subnetwork_indices=index).fit(p.batches())
    J = oracle.jacobian(p.model, p.x_test)[..., index].flatten(0, 1)
    expected = J @ torch.linalg.inv(la.posterior_precision.to_dense()) @ J.T
    torch.testing.assert_close(la(p.x_test, joint=True)[1], expected, rtol=1e-10, atol=1e-13)
    each = torch.stack([expected[i : i + 3, i : i + 3] for i in range(0, len(expected), 3)])
    torch.testing.assert_close(la(p.x_test)[1], each, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_tied_weights_and_sequences(structure):
    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
    index = torch.tensor([0, 1, 4, 8, 13, 17, 20, 30])
    la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=index).fit([(x, y)])
    H = curvature(model, "classification", [(x, y)], structure).to_dense()[index[:, None], index]
    torch.testing.assert_close(la.curvature.to_dense(), H, rtol=1e-10, atol=1e-13)


def test_priors_of_a_subnetwork():
    p = problem("mlp", "classification")
    index = torch.tensor([1, 7, 20, 25, 26, 60, 70])
    la = Laplace(p.model, p.likelihood, "subnetwork", "full", subnetwork_indices=index).fit(p.batches())
    assert [shape.numel() for shape in la._fit.accumulated.space.shapes] == [3, 2, 1, 1]
    H = la.curvature.to_dense()
    by_tensor = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    la.prior_precision = by_tensor
    expected = H + by_tensor.repeat_interleave(torch.tensor([3, 2, 1, 1])).diag()
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected)
    la.prior_precision = each = torch.linspace(0.5, 2, 7).double()
    torch.testing.assert_close(la.posterior_precision.to_dense(), H + each.diag())
    la.prior_precision, la.prior_mean = 1.0, torch.linspace(-1, 1, 7).double()
    deviation = la.mean[index] - la.prior_mean
    at_zero = la.log_marginal_likelihood() + deviation @ deviation / 2
    la.prior_mean = 0.0
    torch.testing.assert_close(la.log_marginal_likelihood() + la.mean[index] @ la.mean[index] / 2, at_zero)
    with pytest.raises(ValueError, match="prior_mean must have 7 entries, found 83"):
        la.prior_mean = torch.zeros(83)
    with pytest.raises(ValueError, match=r"per parameter tensor.*\b7 \(per parameter\) entries, found 5"):
        la.prior_precision = torch.ones(5)


def test_the_prior_of_a_subnetwork_is_optimised_by_its_evidence():
    p = problem("mlp", "classification")
    index = coordinates("scattered", n_params(p.model))
    la = Laplace(p.model, p.likelihood, "subnetwork", "full", subnetwork_indices=index).fit(p.batches())
    la.optimize_prior_precision()
    best = la.prior_precision.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(best), best)
    assert abs(float((gradient * best).detach())) < 1e-6


def test_frozen_parameters_are_not_counted():
    model = mlp()
    model[0].requires_grad_(False)
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    la = Laplace(model, "classification", "subnetwork", "diag", subnetwork_indices=[0, 34]).fit([(x, y)])
    assert la.n_params == 6 * 5 + 5 + 5 * 3 + 3
    assert la._fit.accumulated.space.names == ("2.weight", "2.bias")
    J = oracle.jacobian(model, x, ["2.weight", "2.bias"])[..., [0, 34]]
    L = oracle.output_hessians(model, x, y, oracle.cross_entropy)
    expected = torch.einsum("ncp,ncd,ndp->p", J, L, J)
    torch.testing.assert_close(la.curvature.diagonal(), expected, rtol=1e-10, atol=0)


def test_sums_continue_with_other_data():
    p = problem("mlp", "classification")
    index = coordinates("scattered", n_params(p.model))
    for structure in ("full", "diag", "kron"):
        la = Laplace(p.model, p.likelihood, "subnetwork", structure, subnetwork_indices=index)
        once = la.fit(p.batches()).curvature.to_dense()
        la.fit(p.batches()[:1]).fit(p.batches()[1:], override=False)
        torch.testing.assert_close(la.curvature.to_dense(), once, rtol=1e-10, atol=1e-14)


def test_no_tensor_grows_with_the_parameters_times_their_number():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 2))
    x, y = torch.randn(16, 200), torch.randint(2, (16,))
    index = torch.randperm(60_902, generator=torch.Generator().manual_seed(0))[:100]
    for structure in ("full", "diag", "kron"):
        with forbid_dense(limit=300 * 300 + 1):
            la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=index)
            la.fit([(x, y)])
            la(x)
            la.log_marginal_likelihood()


def test_curvature_takes_a_subnetwork():
    p = problem("mlp", "classification")
    subnetwork = Subnetwork.of(p.model, [3, 50, 51])
    H = curvature(p.model, p.likelihood, p.batches(), "full", subset_of_weights=subnetwork)
    whole = curvature(p.model, p.likelihood, p.batches(), "full").to_dense()
    torch.testing.assert_close(H.to_dense(), whole[[3, 50, 51]][:, [3, 50, 51]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs subnetwork_indices, found None"),
        (
            {"subnetwork_indices": torch.tensor([0, 83])},
            r"subnetwork_indices must lie in 0 .. 82, found 0 .. 83",
        ),
        ({"subnetwork_indices": torch.tensor([1, 1])}, "subnetwork_indices must name each coordinate once"),
        (
            {"subnetwork_indices": torch.tensor([0.5])},
            "subnetwork_indices must hold integers, found torch.float32",
        ),
        ({"subnetwork_indices": torch.ones(83, dtype=torch.bool)}, "subnetwork_indices must hold integers"),
        (
            {"subnetwork_indices": torch.tensor([], dtype=torch.long)},
            "subnetwork_indices must be a non-empty list",
        ),
        ({"subnetwork_indices": torch.tensor([1]), "curvature": "hessian"}, "not supported for a subnetwork"),
        (
            {"subnetwork_indices": torch.tensor([1]), "subset_of_weights": "all"},
            "subnetwork_indices goes with",
        ),
        ({"subset_of_weights": "all", "last_layer_name": "4"}, "last_layer_name goes with"),
        ({"subset_of_weights": "last_layer", "last_layer_name": "9"}, "last_layer_name='9' is no module"),
        (
            {"subset_of_weights": "last_layer", "feature_reduction": "max"},
            "feature_reduction='max' is not supported",
        ),
    ],
)
def test_refusals(arguments, message):
    arguments = {"subset_of_weights": "subnetwork", "hessian_structure": "full"} | arguments
    with pytest.raises(UnsupportedError, match=message):
        Laplace(mlp(), "classification", **arguments)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_one_noise_scale_for_each_output_is_refused(structure):
    p = problem("mlp", "regression")
    la = Laplace(
        p.model, p.likelihood, "subnetwork", structure, subnetwork_indices=[3], sigma_noise=torch.ones(3)
    )
    with pytest.raises(UnsupportedError, match="not supported for a subnetwork; give one number"):
        la.fit(p.batches())


def test_a_dense_submatrix_of_a_product_is_refused_where_it_is_too_large(monkeypatch):
    monkeypatch.setattr("curvlin_nn.subnetwork_structure.MAX_BLOCK", 5)
    p = problem("mlp", "classification")
    scattered = torch.tensor([0, 1, 5, 8, 14, 17])
    la = Laplace(p.model, p.likelihood, "subnetwork", "kron", subnetwork_indices=scattered)
    with pytest.raises(
        UnsupportedError, match=r"chooses 6 coordinates of parameter '0.weight' that are no rows times"
    ):
        la.fit(p.batches())
    Laplace(p.model, p.likelihood, "subnetwork", "kron", subnetwork_indices=range(8)).fit(p.batches())
