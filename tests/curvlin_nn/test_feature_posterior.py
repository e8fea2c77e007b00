"""Posteriors on features against dense algebra on per-sample autodiff, and against the exact posterior they become."""

import network_oracle as oracle
import pytest
import torch
from feature_posterior_cases import CASES, DELTA, TEMPERATURE, fitted, sigma_of
from networks import Problem, Sequences, assert_same, problem, state
from torch import nn

from curvlin import DenseFeatures
from curvlin.testing import forbid_dense
from curvlin_nn import Laplace
from curvlin_nn.early_stopping import fit_early_stopped
from curvlin_nn.errors import OutputError, StaleModelError, StorageError, UnsupportedError
from curvlin_nn.feature_maps import FeatureMap, JacobianMap, LastLayerMap, NystromMap, SketchMap

TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def spanning(p: Problem) -> NystromMap:
    return NystromMap(p.model, p.x, outputs="all")


def rows(model, x):
    return oracle.jacobian(model, x).flatten(0, 1)


def leading(p: Problem, rank: int) -> torch.Tensor:
    """The leading right singular vectors of all rows."""
    return torch.linalg.svd(rows(p.model, p.x), full_matrices=False)[2][:rank].mT


def dense(p: Problem, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """``Phi P^-1 Phi^T``, the residual (both joint over the test data) and log Z, by the formulas."""
    Phi, Lambda = (
        oracle.jacobian(p.model, p.x) @ V,
        oracle.output_hessians(p.model, p.x, p.y, oracle.LOSSES[p.likelihood]),
    )
    H = torch.einsum("nck,ncd,ndl->kl", Phi, Lambda, Phi)
    scale = 1 / (sigma_of(p) ** 2 * TEMPERATURE)
    P = scale * H + DELTA * torch.eye(len(H)).double()
    J = rows(p.model, p.x_test)
    psi = J @ V
    with torch.no_grad():
        f = p.model(p.x)
    if p.likelihood == "classification":
        log_p = torch.distributions.Categorical(logits=f).log_prob(p.y).sum()
    else:
        log_p = torch.distributions.Normal(f, sigma_of(p)).log_prob(p.y).sum()
    theta = torch.cat([q.detach().flatten() for q in p.model.parameters()]) - 0.1
    complexity = torch.slogdet(torch.eye(len(H)).double() + scale * H / DELTA)[1]
    log_z = log_p / TEMPERATURE - DELTA * theta.square().sum() / 2 - complexity / 2
    return psi @ torch.linalg.solve(P, psi.mT), (J @ J.mT - psi @ psi.mT) / DELTA, float(log_z)


def each_sample(joint: torch.Tensor, n: int = 5, c: int = 3) -> torch.Tensor:
    return torch.stack([joint.view(n, c, n, c)[i, :, i] for i in range(n)])


def predicted(la: Laplace, p: Problem) -> torch.Tensor:
    return la._predictive().joint(p.x_test)[1]


# -- features that span all rows of the data are the exact posterior -------------------------------------------------


def test_nystrom_with_all_rows_of_a_model_of_one_number_is_the_full_posterior():
    """Gradients of the only output are the number one for every sample, which is held once."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 1), nn.Flatten(0)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6).double()
    la = Laplace(model, "regression", feature_map=NystromMap(model, x, outputs="all")).fit([(x, y)])
    full = Laplace(model, "regression", "all", "full").fit([(x, y)])
    x_test = torch.randn(5, 4).double()
    torch.testing.assert_close(la(x_test, joint=True)[1], full(x_test, joint=True)[1], **TIGHT)


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_nystrom_with_all_rows_is_the_full_posterior(kind, likelihood):
    p = problem(kind, likelihood)
    la, full = fitted(p, spanning(p)), fitted(p)
    P = oracle.curvature(p.model, p.x, p.y, likelihood, "full") / (sigma_of(p) ** 2 * TEMPERATURE)
    expected = oracle.covariance(p.model, p.x_test, P + DELTA * torch.eye(len(P)).double())
    torch.testing.assert_close(predicted(la, p), expected, **TIGHT)
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(full.log_marginal_likelihood()), rel=1e-10
    )
    if likelihood == "classification":
        torch.testing.assert_close(la(p.x_test), full(p.x_test), **TIGHT)
    else:
        for options in ({}, {"joint": True}, {"diagonal_output": True}, {"observation_noise": True}):
            for found, wanted in zip(la(p.x_test, **options), full(p.x_test, **options), strict=True):
                torch.testing.assert_close(found, wanted, **TIGHT)
    optimum = la.optimize_prior_precision(optimize_noise=likelihood == "regression")
    exact = full.optimize_prior_precision(optimize_noise=likelihood == "regression")
    torch.testing.assert_close(optimum.prior_precision, exact.prior_precision, rtol=1e-7, atol=0)
    assert optimum.sigma_noise == pytest.approx(exact.sigma_noise, rel=1e-7)
    torch.testing.assert_close(predicted(la, p), predicted(full, p), **TIGHT)


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_without_the_residual_variances_are_low_by_exactly_it(kind, likelihood):
    p = problem(kind, likelihood)
    plain, full = fitted(p, spanning(p), residual=False), fitted(p)
    _, residual, _ = dense(p, leading(p, spanning(p).size))
    torch.testing.assert_close(predicted(full, p) - predicted(plain, p), residual, **TIGHT)


def test_the_jacobian_and_the_last_layer_are_feature_maps_too():
    p = problem("cnn", "classification")
    la, full = fitted(p, JacobianMap(p.model)), fitted(p)
    torch.testing.assert_close(la(p.x_test), full(p.x_test), **TIGHT)
    assert torch.equal(la.mean, torch.zeros(full.n_params).double())
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(full.log_marginal_likelihood()), rel=1e-12
    )
    prior = torch.linspace(0.5, 2.0, len(list(p.model.parameters()))).double()
    la.prior_precision = full.prior_precision = prior
    torch.testing.assert_close(la(p.x_test), full(p.x_test), **TIGHT)
    last = Laplace(p.model, p.likelihood, "last_layer", "full", prior_precision=DELTA).fit(p.batches())
    la = fitted(p, LastLayerMap(p.model), temperature=1.0, prior_mean=0.0)
    torch.testing.assert_close(la(p.x_test), last(p.x_test), **TIGHT)
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(last.log_marginal_likelihood()), rel=1e-12
    )


# -- a few directions: the formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "likelihood"), CASES)
@pytest.mark.parametrize("residual", [True, False])
def test_posterior_of_some_directions_is_the_formula(kind, likelihood, residual):
    p = problem(kind, likelihood)
    la = fitted(p, NystromMap(p.model, p.x, rank=4, outputs="all"), residual=residual)
    informed, left_out, log_z = dense(p, leading(p, 4))
    joint = informed + left_out if residual else informed
    torch.testing.assert_close(predicted(la, p), joint, **TIGHT)
    predictive = la._predictive()
    covariance = each_sample(joint)
    torch.testing.assert_close(predictive.mean_and_covariance(p.x_test)[1], covariance, **TIGHT)
    torch.testing.assert_close(
        predictive.mean_and_variance(p.x_test)[1], covariance.diagonal(dim1=1, dim2=2), **TIGHT
    )
    assert float(la.log_marginal_likelihood()) == pytest.approx(log_z, rel=1e-10)
    assert la.n_params == 4 and torch.equal(la.mean, torch.zeros(4).double())
    assert la.posterior_precision.to_dense().shape == (4, 4)
    if residual:
        found = la.residual_covariance(p.x_test)
        torch.testing.assert_close(found.covariance, each_sample(left_out), **TIGHT)
        assert torch.equal(found.clamped, torch.zeros(5).double())


@pytest.mark.parametrize("residual", [True, False])
def test_draws_are_functions_with_the_joint_covariance(residual):
    p = problem("mlp", "regression")
    la = fitted(p, NystromMap(p.model, p.x, rank=4, outputs="all"), residual=residual)
    n = 20_000
    draws = la.functional_samples(p.x_test, n, torch.Generator().manual_seed(0)).flatten(1)
    mean, joint = la(p.x_test, joint=True)
    z = (draws.mean(0) - mean) / (joint.diagonal() / n).sqrt()
    assert z.abs().max() < 4
    centred = draws - mean
    found, variance = centred.mT @ centred / n, joint.diagonal()
    z = (found - joint) / ((torch.outer(variance, variance) + joint.square()) / n).sqrt()
    assert z.abs().max() < 4.5  # of 120 entries
    again = la.functional_samples(p.x_test[2:4], n, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(again, draws.view(n, 5, 3)[:, 2:4].flatten(1), rtol=1e-9, atol=1e-10)


def test_optimum_of_the_prior_is_one_of_the_formula():
    p = problem("cnn", "classification")
    la = fitted(p, NystromMap(p.model, p.x, rank=5, outputs="all"))
    best = float(la.optimize_prior_precision().prior_precision)
    Phi = oracle.jacobian(p.model, p.x) @ leading(p, 5)
    H = torch.einsum(
        "nck,ncd,ndl->kl", Phi, oracle.output_hessians(p.model, p.x, p.y, oracle.cross_entropy), Phi
    )
    values = torch.linalg.eigvalsh(H) / TEMPERATURE
    square = sum(float((q.detach() - 0.1).square().sum()) for q in p.model.parameters())
    # d log Z / d log delta = (gamma - delta |theta - mu|^2) / 2
    gamma = float((values / (values + best)).sum())
    assert gamma == pytest.approx(best * square, rel=1e-7)


def test_float32_networks_lose_nothing_but_rounding():
    p, single = problem("cnn", "regression"), problem("cnn", "regression")
    single = Problem(single.model.float(), p.likelihood, p.x.float(), p.y.float(), p.x_test.float())
    la, la32 = (fitted(q, NystromMap(q.model, q.x, rank=9, outputs="all")) for q in (p, single))
    for found, wanted in zip(la32(single.x_test, joint=True), la(p.x_test, joint=True), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert torch.linalg.eigvalsh(la32(single.x_test)[1]).min() > 0
    assert float(la32.log_marginal_likelihood()) == pytest.approx(
        float(la.log_marginal_likelihood()), rel=1e-5
    )


def test_outputs_of_several_axes_and_one_sample():
    torch.manual_seed(0)
    tokens, labels = torch.randn(6, 3, 4).double(), torch.randint(2, (6,))
    model = Sequences().double()
    la = Laplace(
        model, "classification", feature_map=NystromMap(model, tokens, outputs="all"), prior_precision=DELTA
    )
    full = Laplace(model, "classification", "all", "full", prior_precision=DELTA)
    la.fit([(tokens, labels)]), full.fit([(tokens, labels)])
    torch.testing.assert_close(la(tokens[:1]), full(tokens[:1]), **TIGHT)
    heads = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (2, 3))).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5, 2))
    la = Laplace(
        heads, "classification", feature_map=NystromMap(heads, x, outputs="all"), prior_precision=DELTA
    )
    full = Laplace(heads, "classification", "all", "full", prior_precision=DELTA)
    la.fit([(x, y)]), full.fit([(x, y)])
    assert la(x).shape == (5, 2, 3)
    torch.testing.assert_close(la(x), full(x), **TIGHT)


# -- learned features ------------------------------------------------------------------------------------------------


class Learned(FeatureMap):
    """Features that stand in for a Jacobian without being one in any directions."""

    def __init__(self, model: nn.Module, size: int = 4, n_outputs: int = 3, *, known: bool = True) -> None:
        torch.manual_seed(3)
        self.net = nn.Linear(4, n_outputs * size).double()
        self.model, self._size, self._known = model, size, known

    @property
    def size(self) -> int:
        return self._size

    @property
    def jacobian(self) -> JacobianMap | None:
        return JacobianMap(self.model) if self._known else None

    def tensors(self):
        return dict(self.net.named_parameters())

    def __call__(self, x):
        with torch.no_grad():
            return self.model(x), DenseFeatures(3 * self.net(x).unflatten(1, (-1, self._size)))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_residual_of_learned_features_is_clamped_for_each_input(likelihood):
    p = problem("mlp", likelihood)
    la = fitted(p, Learned(p.model))
    psi = la.feature_map(p.x_test)[1].to_dense()
    Phi = la.feature_map(p.x)[1].to_dense()
    Lambda = oracle.output_hessians(p.model, p.x, p.y, oracle.LOSSES[likelihood])
    H = torch.einsum("nck,ncd,ndl->kl", Phi, Lambda, Phi)
    P = H / (sigma_of(p) ** 2 * TEMPERATURE) + DELTA * torch.eye(4).double()
    J = oracle.jacobian(p.model, p.x_test)
    kappa = J @ J.mT
    values, Q = torch.linalg.eigh(kappa - psi @ psi.mT)
    assert (values < 0).any() and (values > 0).any()
    residual = (Q * values.clamp(min=0)[:, None]) @ Q.mT / DELTA
    informed = psi.flatten(0, 1) @ torch.linalg.solve(P, psi.flatten(0, 1).mT)
    torch.testing.assert_close(predicted(la, p), informed + torch.block_diag(*residual), **TIGHT)
    expected = each_sample(informed) + residual
    torch.testing.assert_close(la._predictive().mean_and_covariance(p.x_test)[1], expected, **TIGHT)
    found = la.residual_covariance(p.x_test)
    torch.testing.assert_close(found.covariance, residual, **TIGHT)
    torch.testing.assert_close(
        found.clamped, -values.clamp(max=0).sum(1) / kappa.diagonal(dim1=1, dim2=2).sum(1), **TIGHT
    )
    n = 20_000
    draws = la.functional_samples(p.x_test, n, torch.Generator().manual_seed(0))
    centred = (draws - p.model(p.x_test).detach()).movedim(1, 0)
    variance = expected.diagonal(dim1=1, dim2=2)
    error = ((variance[:, :, None] * variance[:, None, :] + expected.square()) / n).sqrt()
    assert ((centred.mT @ centred / n - expected) / error).abs().max() < 4


def test_features_that_know_no_jacobian_are_taken_without_residual():
    p = problem("mlp", "regression")
    with pytest.raises(UnsupportedError, match="needs a feature_map that knows its Jacobian, found Learned"):
        fitted(p, Learned(p.model, known=False))
    plain, known = (
        fitted(p, Learned(p.model, known=False), residual=False),
        fitted(p, Learned(p.model), residual=False),
    )
    torch.testing.assert_close(predicted(plain, p), predicted(known, p), rtol=0, atol=0)
    assert float(plain.log_marginal_likelihood()) == float(known.log_marginal_likelihood())
    with pytest.raises(UnsupportedError, match="residual_covariance needs"):
        known.residual_covariance(p.x_test)


def test_features_of_the_wrong_shape_are_refused():
    p = problem("mlp", "regression")
    bad = Learned(p.model, n_outputs=2)
    with pytest.raises(OutputError, match=r"batch 0 must be a FeatureOperator of shape \(3, 3, 4\)"):
        fitted(p, bad)


# -- the object ------------------------------------------------------------------------------------------------------


def test_sums_continue_and_are_stored(tmp_path):
    p = problem("cnn", "classification")
    m = NystromMap(p.model, p.x, rank=6, outputs="all")
    la = Laplace(p.model, p.likelihood, feature_map=m, residual=False, prior_precision=DELTA)
    la.fit(p.batches()[:1]).fit(p.batches()[1:], override=False)
    whole = Laplace(p.model, p.likelihood, feature_map=m, prior_precision=DELTA).fit(p.batches())
    torch.testing.assert_close(la.curvature.to_dense(), whole.curvature.to_dense(), rtol=1e-12, atol=1e-13)
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", p.model, feature_map=m)
    assert torch.equal(found(p.x_test), la(p.x_test)) and not torch.equal(found(p.x_test), whole(p.x_test))
    assert float(found.log_marginal_likelihood()) == float(la.log_marginal_likelihood())
    with pytest.raises(
        StorageError, match=r"feature_map was a NystromMap.*Laplace.load\(..., feature_map=...\)"
    ):
        Laplace.load(tmp_path / "la", p.model)
    with pytest.raises(StorageError, match="another feature_map"):
        Laplace.load(tmp_path / "la", p.model, feature_map=SketchMap(p.model, 6))
    with pytest.raises(StorageError, match="another feature_map"):
        whole.load_state_dict(la.state_dict())
    interrupted = Laplace(p.model, p.likelihood, feature_map=m, prior_precision=DELTA)

    def breaking():
        yield p.batches()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(breaking(), checkpoint=tmp_path / "fit", every=1)
    interrupted.fit(p.batches(), checkpoint=tmp_path / "fit", every=1)
    assert torch.equal(interrupted.curvature.to_dense(), whole.curvature.to_dense())


def test_what_features_cannot_answer_is_refused():
    p = problem("mlp", "regression")
    m = NystromMap(p.model, p.x, rank=4)
    for options, message in [
        (
            {"subset_of_weights": "last_layer"},
            "subset_of_weights='last_layer' is not supported with a feature_map",
        ),
        ({"hessian_structure": "kron"}, "hessian_structure='kron' is not supported with a feature_map"),
        ({"enable_backprop": True}, "enable_backprop=True is not supported with a feature_map"),
        ({"curvature": "hessian"}, "curvature='hessian' is not supported with a feature_map"),
    ]:
        with pytest.raises(UnsupportedError, match=message):
            Laplace(p.model, p.likelihood, feature_map=m, **options)
    Laplace(p.model, p.likelihood, "all", "full", feature_map=m)
    la = fitted(p, m)
    with pytest.raises(UnsupportedError, match="take functional_samples"):
        la.sample(3)
    with pytest.raises(UnsupportedError, match="pred_type='nn'"):
        la(p.x_test, pred_type="nn")
    with pytest.raises(UnsupportedError, match=r"must be one number with a feature_map.*found 4 numbers"):
        la.prior_precision = torch.ones(4)
    with pytest.raises(UnsupportedError, match="prior_structure='layerwise'"):
        la.optimize_prior_precision(prior_structure="layerwise")
    with pytest.raises(UnsupportedError, match="that of another model object"):
        Laplace(problem("mlp", "regression").model, p.likelihood, feature_map=m).fit(p.batches())
    assert "features" in str(la.describe())


def test_features_that_change_after_the_fit_are_noticed():
    p = problem("mlp", "regression")
    la = fitted(p, Learned(p.model))
    with torch.no_grad():
        la.feature_map.net.bias[0] += 1
    with pytest.raises(StaleModelError, match="'bias' of the feature_map changed since fit"):
        la(p.x_test)
    with torch.no_grad():
        la.feature_map.net.bias[0] -= 1


def test_the_model_and_the_default_generator_stay_as_they_are():
    p = problem("cnn", "classification")
    p.model.train()
    before = state(p.model)
    generator = torch.Generator().manual_seed(0)
    la = fitted(p, NystromMap(p.model, p.x, n_samples=5, rank=4, generator=generator))
    SketchMap(p.model, 3, generator=generator)(p.x_test)
    la(p.x_test), la.log_marginal_likelihood(), la.functional_samples(p.x_test, 2, generator)
    assert_same(before, state(p.model))


def test_no_jacobian_is_multiplied_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    x, y = torch.randn(60, 64), torch.randint(10, (60,))
    n_parameters = sum(q.numel() for q in model.parameters())
    with forbid_dense(60 * 10 * n_parameters // 50):
        for m in (NystromMap(model, x, rank=8), SketchMap(model, 8)):
            la = Laplace(model, "classification", feature_map=m).fit([(x, y)])
            la.optimize_prior_precision()
            la(x), la.functional_samples(x, 2)


def test_early_stopping_keeps_the_best_prefix():
    p = problem("mlp", "classification", n=40)
    m = NystromMap(p.model, p.x, rank=5, outputs="all")
    la = Laplace(p.model, p.likelihood, feature_map=m, residual=False, prior_precision=1e-2)
    train, held_out = p.batches(4)[:8], p.batches(4)[8:]
    stop = fit_early_stopped(la, train, held_out, every=8, patience=10)
    assert list(stop.scores) == [8, 16, 24, 32]
    assert stop.n_data == la.n_data == min(stop.scores, key=stop.scores.__getitem__)
    for n, score in stop.scores.items():
        prefix = Laplace(p.model, p.likelihood, feature_map=m, residual=False, prior_precision=1e-2)
        prefix.fit(train[: n // 4])
        with torch.no_grad():
            nll = [-prefix(x).log().gather(1, y[:, None]) for x, y in held_out]
        assert score == pytest.approx(float(torch.cat(nll).mean()), rel=1e-9)
    best = Laplace(p.model, p.likelihood, feature_map=m, residual=False).fit(train[: stop.n_data // 4])
    torch.testing.assert_close(la.curvature.to_dense(), best.curvature.to_dense(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "loader"), [("gridsearch", "val_loader"), ("brent", "val_loader"), ("cv", "train_loader")]
)
def test_held_out_data_choose_the_prior_as_for_the_full_posterior(method, loader):
    p = problem("mlp", "classification")
    data = [(p.x_test, p.y[:5])] if loader == "val_loader" else p.batches()
    options = {"method": method, loader: data} | ({} if method == "brent" else {"grid_size": 5})
    la, full = fitted(p, spanning(p)), fitted(p)
    found, expected = la.optimize_prior_precision(**options), full.optimize_prior_precision(**options)
    assert float(found.prior_precision) == pytest.approx(float(expected.prior_precision), rel=1e-5)
    assert found.score == pytest.approx(expected.score, rel=1e-8)


def test_noise_of_each_output_is_that_of_the_full_posterior():
    p = problem("cnn", "regression")
    sigma = torch.tensor([0.3, 0.5, 0.8]).double()
    la, full = fitted(p, spanning(p), sigma_noise=sigma), fitted(p, sigma_noise=sigma)
    torch.testing.assert_close(predicted(la, p), predicted(full, p), **TIGHT)
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(full.log_marginal_likelihood()), rel=1e-10
    )
