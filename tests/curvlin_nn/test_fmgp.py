"""FMGP against dense algebra on kernels that are written out, gpytorch's own strategy, and what it is meant for."""

from __future__ import annotations

import copy
import math
from typing import Any

import gpytorch
import network_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from curvlin_nn.errors import (
    DataError,
    NotFittedError,
    OutputError,
    StaleModelError,
    TrainingDivergedError,
    UnsupportedError,
)
from curvlin_nn.likelihoods import Poisson, resolve
from curvlin_nn.metrics import evaluate
from curvlin_nn.variational import FMGP, fixed_mean_gp, kernels
from curvlin_nn.variational.fixed_mean_gp import FixedMeanGP
from curvlin_nn.variational.fixed_mean_objective import FixedMeanObjective
from curvlin_nn.variational.points import Points

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
N, D, H, M = 6, 3, 5, 7


def network(n_outputs: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, n_outputs, bias=bias)).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process(name: str, n_outputs: int) -> tuple[nn.Sequential, Points, FixedMeanGP]:
    """A process whose numbers are all at random, but for an inducing point that is there twice."""
    model = network(n_outputs)
    points = Points(model, name == "rbf_x_last_layer")
    seen = points(normal(M, D, seed=1))
    Z = torch.cat([seen.points[:-1], seen.points[:1]])
    outputs = torch.arange(M) % n_outputs
    outputs[-1] = outputs[0]
    noise = torch.tensor(0.3 if name == "rbf" else 1.0)
    gp = FixedMeanGP(kernels.made(name, seen.points, D), n_outputs, Z, outputs, noise)
    with torch.no_grad():
        for seed, p in enumerate(p for p in gp.parameters() if p.requires_grad and p is not gp.points):
            p.add_(0.3 * normal(*p.shape, seed=seed))
    return model, points, gp


def written_out(model: nn.Sequential, gp: FixedMeanGP, name: str) -> Any:
    """The kernel of the process, entry by entry: ``(points, outputs) x (points, outputs)``."""
    is_product = name == "rbf_x_last_layer"
    rbf = gp.kernel.kernels[0] if is_product else gp.kernel
    lengths = F.softplus(rbf.raw_lengthscale.detach()).squeeze(0)
    weight = F.softplus(gp.kernel.kernels[1].raw_variance.detach()).squeeze() if is_product else 1.0
    factor = gp.output_kernel.covar_factor.detach()
    B = factor @ factor.mT + F.softplus(gp.output_kernel.raw_var.detach()).diag()

    def entry(x: Tensor, c: int, y: Tensor, d: int) -> Tensor:
        value = torch.exp(-((x[:D] - y[:D]) / lengths).square().sum() / 2) * B[c, d]
        return value * weight * (x[D:] @ y[D:]) if is_product else value

    def gram(xs: list[tuple[Tensor, int]], ys: list[tuple[Tensor, int]]) -> Tensor:
        return torch.stack([torch.stack([entry(*x, *y) for y in ys]) for x in xs])

    return gram


def dense(model: nn.Sequential, gp: FixedMeanGP, name: str, x: Tensor) -> dict[str, Tensor]:
    """The posterior at x by the formula, with inverses."""
    gram, n_outputs = written_out(model, gp, name), model[-1].out_features
    hidden = torch.cat([model[:2](x), torch.ones(len(x), 1).double()], dim=1).detach()
    points = torch.cat([x, hidden], dim=1) if name == "rbf_x_last_layer" else x
    data = [(p, c) for p in points for c in range(n_outputs)]
    inducing = list(zip(gp.points.detach(), gp.outputs.tolist(), strict=True))
    L = gp.root.detach().tril()
    A, k_Z, k_xZ = L @ L.mT, gram(inducing, inducing), gram(data, inducing)
    taken = torch.linalg.inv(torch.linalg.inv(A) + k_Z)
    joint = gram(data, data) - k_xZ @ taken @ k_xZ.mT
    return {"joint": joint, "A": A, "k_Z": k_Z, "mean": k_xZ @ gp.companion.detach()}


CASES = [("rbf", 1), ("rbf", 2), ("rbf_x_last_layer", 3)]


@pytest.mark.parametrize(("name", "n_outputs"), CASES)
def test_covariances_are_those_of_the_formula(name: str, n_outputs: int) -> None:
    model, points, gp = process(name, n_outputs)
    x = normal(N, D, seed=2)
    expected = dense(model, gp, name, x)["joint"]
    seen, posterior = points(x).points, gp.covariance()
    torch.testing.assert_close(posterior.joint(seen).detach(), expected, **TIGHT)
    cross = posterior.cross(seen)
    blocks = expected.reshape(N, n_outputs, N, n_outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    torch.testing.assert_close(posterior.by_sample(seen, cross).detach(), blocks, **TIGHT)
    variance = posterior.variance(seen, cross).detach()
    torch.testing.assert_close(variance.flatten(), expected.diagonal(), **TIGHT)


@pytest.mark.parametrize(("name", "n_outputs"), CASES)
def test_draws_are_a_linear_map_of_noise_whose_square_is_the_joint_covariance(
    name: str, n_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, points, gp = process(name, n_outputs)
    seen = points(torch.cat([normal(N, D, seed=2), normal(1, D, seed=2)])).points  # one sample is there twice
    sizes = [(M + len(seen)) * n_outputs, M]
    unit = iter(torch.eye(sum(sizes)).double().split(sizes, dim=1))

    def basis(sample_shape: tuple[int], shape: torch.Size, generator: None, like: Tensor) -> Tensor:
        return next(unit).reshape(*sample_shape, *shape)

    monkeypatch.setattr(fixed_mean_gp, "standard_normal", basis)
    with torch.no_grad():
        posterior = gp.covariance()
        (rows,) = (draws.flatten(1) for draws in posterior.samples(seen, sum(sizes), None))
        torch.testing.assert_close(rows.mT @ rows, posterior.joint(seen), **TIGHT)


@pytest.mark.parametrize(("name", "n_outputs"), CASES)
def test_the_objective_is_that_of_normals_over_features(name: str, n_outputs: int) -> None:
    """With ``k_Z = G G^T`` the process is, as far as Z sees it, one of weights ``w ~ N(0, I)``."""
    model, points, gp = process(name, n_outputs)
    x = normal(N, D, seed=2)
    likelihood = resolve("classification" if name == "rbf_x_last_layer" else "regression")
    y = torch.arange(N) % 3 if likelihood.has_classes else normal(N, n_outputs, seed=3)
    found = FixedMeanObjective(points, gp, likelihood, n_data=40).loss(x, y, "the batch").detach()

    parts = dense(model, gp, name, x)
    values, vectors = torch.linalg.eigh(parts["k_Z"])
    G = vectors * values.clamp(min=0).sqrt()
    eye = torch.eye(M).double()
    prior = MultivariateNormal(torch.zeros(M).double(), eye)
    S = torch.linalg.inv(eye + G.mT @ parts["A"] @ G)
    penalty = kl_divergence(MultivariateNormal(torch.zeros(M).double(), S), prior)
    penalty = penalty + kl_divergence(MultivariateNormal(G.mT @ gp.companion.detach(), S), prior)
    fit = torch.zeros(()).double()
    sigma = gp.log_sigma.detach().exp()
    for f in (model(x).detach(), parts["mean"].reshape(N, n_outputs)):
        for n in range(N):
            rows = slice(n * n_outputs, (n + 1) * n_outputs)
            V = parts["joint"][rows, rows]
            if likelihood.has_classes:
                fit += (f[n] / torch.sqrt(1 + math.pi / 8 * V.diagonal())).log_softmax(0)[y[n]]
            else:
                noisy = V + sigma**2 * torch.eye(n_outputs).double()
                fit += MultivariateNormal(f[n], noisy).log_prob(y[n])
    torch.testing.assert_close(found, penalty - 40 / N * fit, rtol=1e-9, atol=1e-10)


def test_a_strategy_of_gpytorch_with_that_covariance_agrees() -> None:
    """Its prior mean the network, its inducing values zero, its whitened covariance ``(I + K^T A K)^-1``."""
    model = network(1)
    Z, x = 2 * normal(M, D, seed=1), normal(N, D, seed=2)
    gp = FixedMeanGP(kernels.made("rbf", Z, D), 1, Z, torch.zeros(M).long(), torch.tensor(0.3))
    with torch.no_grad():
        gp.root.add_(0.3 * normal(M, M))
        k_Z = gp.covariance().dual.kernel
        K = torch.linalg.cholesky(k_Z + 1e-10 * torch.eye(M))
        A = gp.root.tril() @ gp.root.tril().mT
        S = torch.linalg.inv(torch.eye(M) + K.mT @ A @ K)

    class Reference(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            distribution = gpytorch.variational.CholeskyVariationalDistribution(M)
            strategy = gpytorch.variational.VariationalStrategy(self, Z, distribution, jitter_val=1e-10)
            super().__init__(strategy.double())
            distribution.variational_mean.data.zero_()
            distribution.chol_variational_covar.data.copy_(torch.linalg.cholesky(S))
            strategy.variational_params_initialized.fill_(1)

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(model(x).squeeze(1), gp.kernel(x))

    with torch.no_grad():
        expected = Reference().eval()(x)
        torch.testing.assert_close(expected.mean, model(x).squeeze(1), **TIGHT)
        torch.testing.assert_close(gp.covariance().joint(x), expected.covariance_matrix, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_of_the_last_layer_is_the_gram_matrix_of_its_jacobian(bias: bool) -> None:
    """Classes do not share features: the published code gives them ``h . h' + delta_cc'``."""
    model = network(3, bias=bias)
    x = normal(N, D)
    seen = Points(model, True)(x)
    kernel = kernels.made("rbf_x_last_layer", seen.points, D)
    kernel.kernels[0].lengthscale = 1e9  # the other factor is one
    J = oracle.jacobian(model, x, ["2.weight", "2.bias"][: 1 + bias]).flatten(0, 1)
    B = kernels.of_outputs(3, seen.points).covar_matrix.to_dense()
    with torch.no_grad():
        found = torch.kron(kernels.gram(kernel, seen.points, seen.points), B)
        ratio = found[0, 0] / (J @ J.mT)[0, 0]
        torch.testing.assert_close(found, ratio * J @ J.mT, **TIGHT)
        torch.testing.assert_close(found.trace() / len(found), torch.ones(()).double(), **TIGHT)


def test_lengthscales_begin_at_the_median_distance_of_samples() -> None:
    x = normal(20, D)
    distances = [float((x[i] - x[j]).norm()) for i in range(20) for j in range(i)]
    middle = sorted(distances)[(len(distances) - 1) // 2]
    lengths = kernels.made("rbf", x, D).lengthscale.detach()
    torch.testing.assert_close(lengths, torch.full((1, D), middle / 2**0.5, dtype=torch.float64), **TIGHT)
    assert kernels.made("rbf", torch.ones(4, D).double(), D).lengthscale.min() > 0.5  # not NaN


def test_a_prior_on_a_kernel_counts_once() -> None:
    _, points, gp = process("rbf", 1)
    x, y = normal(N, D, seed=2), normal(N, 1, seed=3)
    objective = FixedMeanObjective(points, gp, resolve("regression"), n_data=40)
    before = objective.loss(x, y, "the batch").detach()
    gp.kernel.register_prior("lengthscale_prior", gpytorch.priors.GammaPrior(3.0, 6.0), "lengthscale")
    lengths = gp.kernel.lengthscale.detach()
    density = torch.distributions.Gamma(3.0, 6.0).log_prob(lengths).sum()
    after = objective.loss(x, y, "the batch").detach()
    torch.testing.assert_close(after, before - density, **TIGHT)


# -- fitted --------------------------------------------------------------------------------------------------


def toy(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A sine with a gap around zero, and a noise that grows to the right."""
    side = (torch.arange(n) % 2).double() * 2 - 1
    x = side * (1 + 2 * torch.rand(n, generator=torch.Generator().manual_seed(seed)).double())
    y = torch.sin(2 * x) + torch.where(x > 0, 0.3, 0.05) * normal(n, seed=seed + 1)
    return x[:, None], y[:, None]


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A network of the toy, in float32, in training mode with dropout that has to be off."""
    x, y = (t.float() for t in toy(120, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1), nn.Dropout(0.5))
        model[3].eval()
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        for _ in range(400):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    model.zero_grad()
    return model.train()


def loader(seed: int, n: int = 120) -> list[tuple[Tensor, Tensor]]:
    x, y = (t.float() for t in toy(n, seed))
    return list(zip(x.split(40), y.split(40), strict=True))


@pytest.fixture(scope="module")
def fitted(trained: nn.Sequential) -> FMGP:
    generator = torch.Generator().manual_seed(0)
    fm = FMGP(trained, "regression", n_inducing=15, inducing="random", sigma_noise=0.3, generator=generator)
    return fm.fit(loader(0), n_steps=250, lr=2e-2)


def test_the_mean_is_the_network_bit_for_bit_and_the_model_is_left_alone(
    trained: nn.Sequential, fitted: FMGP
) -> None:
    assert trained.training and trained[3].training and all(p.grad is None for p in trained.parameters())
    assert all(p.requires_grad for p in trained.parameters())
    x = torch.linspace(-4, 4, 501)[:, None]
    expected = copy.deepcopy(trained).eval()(x)
    mean, covariance = fitted(x)
    assert torch.equal(mean, expected) and mean.dtype == covariance.dtype == torch.float32
    joint_mean, joint = fitted(x[:9], joint=True)
    torch.testing.assert_close(joint.diagonal(), covariance[:9].flatten())
    assert torch.equal(joint_mean, copy.deepcopy(trained).eval()(x[:9]).flatten())
    assert torch.equal(fitted.predict(x).mean, expected)


def test_variance_grows_away_from_the_data_and_predictions_beat_a_constant_noise(
    trained: nn.Sequential, fitted: FMGP
) -> None:
    def variance(*at: float) -> Tensor:
        return fitted(torch.tensor(at)[:, None], diagonal_output=True)[1]

    assert float(variance(0.0, 5.0, -5.0).min()) > 3 * float(variance(-2.0, 2.0).max())
    assert float(variance(2.0)) > 2 * float(variance(-2.0))  # where the noise is larger
    x, y = (torch.cat(parts) for parts in zip(*loader(0), strict=True))
    model = copy.deepcopy(trained).eval()
    best = (model(x) - y).square().mean().detach()
    held_out = loader(7, 400)
    constant = evaluate(lambda x: (model(x).detach(), best.expand(len(x), 1)), held_out, ["nll"])["nll"]
    assert evaluate(fitted, held_out, ["nll"])["nll"] < constant - 0.2


def test_draws_have_the_joint_covariance(fitted: FMGP) -> None:
    x = torch.tensor([[-2.0], [0.0], [0.3], [4.0]])
    mean, joint = fitted(x, joint=True)
    n = 20_000
    draws = fitted.functional_samples(x, n, torch.Generator().manual_seed(3)).flatten(1).double()
    again = fitted.functional_samples(x, n, torch.Generator().manual_seed(3)).flatten(1).double()
    assert torch.equal(draws, again)
    deviation, joint = draws - mean.double(), joint.double()
    variance = joint.diagonal()
    spread = torch.sqrt((variance[:, None] * variance + joint**2) / n)
    assert (((deviation.mT @ deviation / n - joint) / spread).abs() < 4).all()
    assert ((deviation.mean(0) / torch.sqrt(variance / n)).abs() < 4).all()


def test_the_best_state_of_held_out_data_is_kept(trained: nn.Sequential) -> None:
    def fit(**options: Any) -> FMGP:
        generator = torch.Generator().manual_seed(0)
        fm = FMGP(trained, "regression", n_inducing=8, inducing="random", generator=generator)
        return fm.fit(loader(0), lr=0.2, every=5, validation_loader=loader(7), **options)

    fm = fit(n_steps=400, patience=3)
    history = fm.history
    assert history.steps[-1] == history.best_step + 15 < 400
    score = evaluate(fm, loader(7), ["nll"])["nll"]
    assert score == pytest.approx(min(history.scores), rel=1e-5)
    assert history.scores.index(min(history.scores)) * 5 == history.best_step


def test_a_divergence_says_so_and_loses_nothing(trained: nn.Sequential, fitted: FMGP) -> None:
    fm, x = copy.copy(fitted), torch.zeros(1, 1)
    before = fm(x)
    with pytest.raises(TrainingDivergedError, match="diverged at step") as caught:
        fm.fit(loader(0), n_steps=50, lr=1e300)
    assert torch.equal(fm(x)[1], before[1])
    best = caught.value.best
    assert isinstance(best, FMGP) and best is not fm and torch.isfinite(best(x)[1]).all()


def test_the_callers_random_numbers_and_kernel_are_left_alone(trained: nn.Sequential) -> None:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5))
    held = copy.deepcopy(kernel.state_dict())
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    fits = []
    for _ in range(2):
        fm = FMGP(
            trained, "regression", n_inducing=5, kernel=kernel, generator=torch.Generator().manual_seed(0)
        )
        fits.append(fm.fit(loader(0), n_steps=5, lr=0.1))
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(held[name], tensor) for name, tensor in kernel.state_dict().items())
    learned, given = (k.base_kernel.lengthscale.detach().double() for k in (fits[0].kernel, kernel))
    assert not torch.equal(learned, given)
    assert torch.equal(fits[0](torch.zeros(1, 1))[1], fits[1](torch.zeros(1, 1))[1])
    assert fits[0].n_data == 120


def labelled(n: int = 60) -> list[tuple[Tensor, Tensor]]:
    x = normal(n, D, seed=5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return list(zip(x.split(20), y.split(20), strict=True))


def test_classes_have_their_own_inducing_points_and_probabilities() -> None:
    fm = FMGP(network(3), "classification", n_inducing=9, generator=torch.Generator().manual_seed(0))
    fm.fit(labelled(), n_steps=10)
    assert fm.gp.outputs.bincount().tolist() == [3, 3, 3]
    x = normal(5, D)
    f, prediction = network(3)(x).detach(), fm.predict(x)
    variance = prediction.output_covariance.diagonal(dim1=1, dim2=2)
    expected = (f / torch.sqrt(1 + math.pi / 8 * variance)).softmax(-1)
    torch.testing.assert_close(fm(x), expected, **TIGHT)
    torch.testing.assert_close(prediction.mean, expected, **TIGHT)
    assert fm(x, link_approx="mc", n_samples=50, generator=torch.Generator().manual_seed(0)).shape == (5, 3)
    given = FMGP(network(3), "classification", inducing=(x[:3], torch.tensor([2, 0, 1])))
    assert given.fit(labelled(), n_steps=1).gp.outputs.tolist() == [2, 0, 1]


class Shaped(nn.Module):
    """Outputs of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.network, self.shape = network(max(1, math.prod(shape))), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).reshape(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("likelihood", ["regression", "binary"])
def test_outputs_of_other_shapes(shape: tuple[int, ...], likelihood: str) -> None:
    x = normal(12, D)
    y = normal(12, *shape, seed=1)
    data = [(x, y if likelihood == "regression" else (y > 0).double())]
    fm = FMGP(Shaped(*shape), likelihood, n_inducing=4, inducing="random").fit(data, n_steps=3)
    C = max(1, math.prod(shape))
    if likelihood == "binary":
        assert fm(x[:1]).shape == (1, *(shape or (1,)))
        assert ((fm(x) - 0.5).abs() < (Shaped(*shape)(x).reshape(fm(x).shape).sigmoid() - 0.5).abs()).all()
    else:
        mean, covariance = fm(x[:1])
        assert mean.shape == (1, C) and covariance.shape == (1, C, C)
        assert fm(x, joint=True)[1].shape == (12 * C, 12 * C)
    assert fm.functional_samples(x, 3).shape == (3, 12, C)


def test_states_that_cannot_answer(trained: nn.Sequential, fitted: FMGP) -> None:
    with pytest.raises(NotFittedError, match="not fitted"):
        FMGP(trained, "regression")(torch.zeros(1, 1))
    with pytest.raises(UnsupportedError, match="pred_type='nn'"):
        fitted(torch.zeros(1, 1), pred_type="nn")
    with pytest.raises(DataError, match="1 numbers for each sample"):
        fitted._seen(torch.zeros(2, 3, 1))
    changed = copy.copy(fitted)
    changed.model = copy.deepcopy(trained)
    with torch.no_grad():
        changed.model[0].weight.add_(1)
    with pytest.raises(StaleModelError, match=r"0\.weight"):
        changed(torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_inducing": 0}, ValueError, "n_inducing must be a positive integer"),
        ({"kernel": "matern"}, UnsupportedError, "kernel='matern' is not supported; expected one of 'rbf'"),
        ({"kernel": nn.Linear(1, 1)}, UnsupportedError, "found Linear|kernel=Linear"),
        (
            {"kernel": gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))},
            UnsupportedError,
            "found a batch of shape",
        ),
        ({"inducing": "grid"}, UnsupportedError, "inducing='grid' is not supported"),
        ({"likelihood": Poisson()}, UnsupportedError, "poisson"),
        ({"sigma_noise": -1.0}, ValueError, "sigma_noise must be positive"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FMGP(network(1), **{"likelihood": "regression", **options})


@pytest.mark.parametrize(
    ("options", "fit", "error", "message"),
    [
        ({}, {"n_steps": 0}, ValueError, "n_steps must be a positive integer"),
        ({}, {"lr": -1.0}, ValueError, "lr must be positive"),
        ({"n_inducing": 100}, {}, DataError, "n_inducing must be at most"),
        ({}, {"train_loader": []}, DataError, "yielded no"),
        ({}, {"validation_loader": []}, DataError, "yielded no"),
        (
            {"kernel": gpytorch.kernels.RBFKernel(ard_num_dims=2)},
            {},
            UnsupportedError,
            "flat inputs of 3 numbers",
        ),
        (
            {"kernel": gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), num_tasks=2)},
            {},
            UnsupportedError,
            "one number for a pair",
        ),
        ({"inducing": (normal(4, 2), torch.zeros(4).long())}, {}, DataError, "inducing"),
        ({"inducing": (normal(4, D), torch.ones(4).long())}, {}, ValueError, "must lie in"),
        ({"sigma_noise": torch.ones(2)}, {}, ValueError, "one for each output"),
        ({}, {"train_loader": [(normal(9, D), normal(9, 2))]}, DataError, "targets of"),
        (
            {},
            {"train_loader": [({"a": normal(9, D), "b": normal(9, D)}, normal(9, 1))]},
            DataError,
            "one tensor",
        ),
        ({}, {"train_loader": [(normal(9, D) * math.inf, normal(9, 1))]}, DataError, "finite"),
    ],
)
def test_fits_that_are_refused(
    options: dict[str, Any], fit: dict[str, Any], error: type[Exception], message: str
) -> None:
    if not isinstance(options.get("inducing"), tuple):
        options = {"n_inducing": 4, "inducing": "random", **options}
    fm = FMGP(network(1), "regression", **options)
    with pytest.raises(error, match=message):
        fm.fit(**{"train_loader": [(normal(9, D), normal(9, 1))], "n_steps": 1, **fit})
    with pytest.raises(NotFittedError):
        fm(normal(1, D))


def test_a_last_layer_that_is_not_linear_is_refused() -> None:
    model = nn.Sequential(network(3), nn.Softplus())
    with pytest.raises(UnsupportedError, match="those of a linear layer"):
        FMGP(model, "classification", n_inducing=3, inducing="random").fit(labelled(), n_steps=1)
    changing = Shaped(1)
    fm = FMGP(changing, "regression", n_inducing=3, inducing="random").fit(
        [(normal(9, D), normal(9, 1))], n_steps=1
    )
    changing.shape = (1, 1)
    with pytest.raises(OutputError, match="as in fit"):
        fm(normal(2, D))


class Rectified(nn.Module):
    """What its last layer returns is written over, by what it is already."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).mul_(1)


def test_a_last_layer_whose_outputs_are_written_over_is_refused() -> None:
    x = normal(2, D)
    with pytest.raises(UnsupportedError, match="those of a linear layer"):
        Points(Rectified(), True)(x)
    assert torch.equal(Points(Rectified(), False)(x).points, x)
