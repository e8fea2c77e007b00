"""The worked examples: what they print, against dense linear algebra that shares no code with the operators."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from curvlin import Dense, Gaussian, KroneckerSum

ROOT = Path(__file__).parents[1]
close = torch.testing.assert_close


@pytest.fixture
def example(monkeypatch):
    """An example as a module, by name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    loaded = []

    def load(name):
        loaded.append(name)
        return __import__(name)

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", text)]


@pytest.mark.parametrize("name", ["kronecker_regression", "gmrf", "kalman"])
def test_page_shows_what_the_example_prints(example, capsys, name):
    example(name).main()
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "examples" / f"{name}.md").read_text()
    assert f'--8<-- "examples/{name}.py"' in page  # the code itself
    (shown,) = re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)
    assert re.sub(r"[-\d.]+|\s+", " ", shown).split() == re.sub(r"[-\d.]+|\s+", " ", printed).split()
    close(torch.tensor(numbers(shown)), torch.tensor(numbers(printed)), rtol=0.02, atol=0.002)


# -- kronecker_regression ------------------------------------------------------------------------------------------


def dense_regression(fitted, X: Tensor, Y: Tensor):
    """The posterior of vec(W), and the evidence of vec(Y) as one Gaussian of N R dimensions."""
    N, R = Y.shape
    design = (
        torch.kron(X, torch.eye(R, dtype=X.dtype)).unflatten(1, (X.shape[1], R)).transpose(1, 2).flatten(1)
    )
    prior = torch.kron(fitted.G, fitted.A)
    noise = torch.kron(torch.eye(N, dtype=X.dtype), fitted.Lambda)
    precision = prior + design.mT @ noise @ design
    mean = torch.linalg.solve(precision, design.mT @ noise @ Y.flatten())
    evidence = MultivariateNormal(
        torch.zeros(N * R, dtype=X.dtype),
        covariance_matrix=design @ torch.linalg.solve(prior, design.mT) + torch.linalg.inv(noise),
    ).log_prob(Y.flatten())
    return design, precision, mean, evidence


@pytest.fixture
def regression(example):
    """The module, part of its data, and a model with no zero in it whose tensors need gradients."""
    module = example("kronecker_regression")
    data = module.load()
    root = torch.tensor([[1.2, 0.0, 0.0], [-0.4, 1.1, 0.0], [0.3, -0.2, 0.9]], dtype=torch.float64)
    G = (2 * root.mT @ root).requires_grad_()
    A = module.model(root, torch.full((4,), 1.5, dtype=torch.float64), True).A.requires_grad_()
    fitted = module.Model(G, A, (root @ root.mT).requires_grad_())
    return module, data, fitted, data.X[:60], data.Y[:60]


def test_kronecker_regression_has_the_evidence_and_gradient_of_the_dense_model(regression):
    _, _, fitted, X, Y = regression
    posterior, evidence = fitted.posterior(X, Y)
    _, precision, mean, dense_evidence = dense_regression(fitted, X, Y)
    close(posterior.precision.to_dense(), precision)
    close(posterior.mean, mean, rtol=1e-8, atol=1e-10)
    close(evidence, dense_evidence, rtol=1e-10, atol=0)
    leaves = (fitted.G, fitted.A, fitted.Lambda)
    gradients = torch.autograd.grad(evidence, leaves)
    for ours, dense in zip(gradients, torch.autograd.grad(dense_evidence, leaves), strict=True):
        # Along symmetric directions, the only ones there are.
        close(ours + ours.mT, dense + dense.mT, rtol=1e-7, atol=1e-8)


def test_kronecker_regression_predicts_like_the_dense_model(regression):
    _, data, fitted, X, Y = regression
    posterior, _ = fitted.posterior(X, Y)
    prediction = fitted.predict(posterior, data.X_test[:7])
    _, precision, mean, _ = dense_regression(fitted, X, Y)
    for n, x in enumerate(data.X_test[:7]):
        row = torch.kron(torch.eye(3, dtype=torch.float64), x[None])
        covariance = row @ torch.linalg.solve(precision, row.mT) + torch.linalg.inv(fitted.Lambda)
        close(prediction.mean[n], row @ mean)
        close(prediction.covariance.to_dense()[n], covariance)


def test_kronecker_regression_agrees_with_conditioning_on_the_outputs(regression):
    module, _, fitted, X, Y = regression
    posterior, evidence = fitted.posterior(X, Y)
    prior = Gaussian(torch.zeros_like(posterior.mean), KroneckerSum([(fitted.G, fitted.A)]))
    other, other_evidence = prior.condition(module.features(X, 3), Y, Dense(fitted.Lambda))
    close(other.mean, posterior.mean, rtol=1e-8, atol=1e-10)
    close(other_evidence, evidence)


def test_kronecker_regression_learns_to_a_stationary_point(example):
    module = example("kronecker_regression")
    data = module.load()
    apart, coupled = (module.learn(data, choice) for choice in (False, True))
    assert coupled.posterior(data.X, data.Y)[1] > apart.posterior(data.X, data.Y)[1] + 10  # which it contains
    *_, evidence = dense_regression(coupled, data.X, data.Y)
    for matrix in ("G", "Lambda"):
        for factor in (0.95, 1.05):
            moved = module.Model(**{**vars(coupled), matrix: factor * getattr(coupled, matrix)})
            assert dense_regression(moved, data.X, data.Y)[-1] < evidence


# -- gmrf ----------------------------------------------------------------------------------------------------------


def test_gmrf_prior_is_the_covariance_of_an_autoregression(example):
    module = example("gmrf")
    covariance = torch.linalg.inv(module.autoregression(0.9, 0.7, 12).to_dense())
    lag = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    close(covariance, 0.7**2 * 0.9 ** lag.double())


def test_gmrf_posterior_is_that_of_the_dense_covariance(example):
    module = example("gmrf")
    result = module.analyse(n_draws=4000)
    Phi, y = result.Phi, result.y
    C = torch.linalg.inv(result.prior.precision.to_dense())
    S = Phi @ C @ Phi.mT + module.NOISE_SD**2 * torch.eye(len(y), dtype=torch.float64)
    gain = torch.linalg.solve(S, Phi @ C).mT
    mean, covariance = gain @ y, C - gain @ Phi @ C
    close(result.posterior.mean, mean, rtol=1e-8, atol=1e-10)
    close(result.posterior.variance, covariance.diagonal(), rtol=1e-8, atol=0)
    evidence = MultivariateNormal(torch.zeros_like(y), covariance_matrix=S).log_prob(y)
    close(result.log_evidence, evidence, rtol=1e-10, atol=0)

    pair = [*module.months_of(1), *module.months_of(2)]
    close(result.pair.mean, mean[pair], rtol=1e-8, atol=1e-10)
    close(result.pair.covariance.to_dense(), covariance[pair][:, pair], rtol=1e-8, atol=1e-10)

    index = list(module.months_of(1))
    others = [i for i in range(len(C)) if i not in set(index)]
    weights = torch.linalg.solve(covariance[others][:, others], covariance[others][:, index]).mT
    given = mean[index] + weights @ (result.truth[others] - mean[others])
    left = covariance[index][:, index] - weights @ covariance[others][:, index]
    close(result.given.mean, given, rtol=1e-6, atol=1e-8)
    close(result.given.variance, left.diagonal(), rtol=1e-6, atol=0)

    # Draws: whitened by the dense covariance they are standard normal.
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky((covariance + covariance.mT) / 2), (result.draws - mean).mT, upper=False
    )
    close(z.square().mean(), torch.ones((), dtype=torch.float64), rtol=4 * (2 / z.numel()) ** 0.5, atol=0)
    assert z.mean(1).norm() ** 2 * z.shape[1] < z.shape[0] + 4 * (2 * z.shape[0]) ** 0.5


# -- kalman --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_kalman(example, monkeypatch):
    """With so few waves that a covariance filter is cheap, and its rounding small."""
    module = example("kalman")
    monkeypatch.setattr(module, "WAVES", 120)
    monkeypatch.setattr(module, "STEPS", 12)
    return module


def covariance_filter(module, stream, rho: float, skip: int | None = None):
    """The textbook Kalman filter on a dense covariance, in Joseph form."""
    C0 = torch.linalg.inv(module.prior().precision.to_dense())
    mean, C, gains = torch.zeros(len(C0), dtype=torch.float64), C0, []
    for step, (Phi, y) in enumerate(zip(stream.Phi, stream.y, strict=True)):
        if rho != 1.0:
            mean, C = rho * mean, rho**2 * C + (1 - rho**2) * C0
        if step == skip:
            continue
        noise = module.NOISE_SD**2 * torch.eye(len(y), dtype=torch.float64)
        S = Phi @ C @ Phi.mT + noise
        gains.append(MultivariateNormal(Phi @ mean, covariance_matrix=S).log_prob(y))
        K = torch.linalg.solve(S, Phi @ C).mT
        left = torch.eye(len(C), dtype=torch.float64) - K @ Phi
        mean, C = mean + K @ (y - Phi @ mean), left @ C @ left.mT + K @ noise @ K.mT
    return mean, C, torch.stack(gains)


@pytest.mark.parametrize("rho", [1.0, 0.9])
def test_kalman_steps_are_those_of_the_covariance_filter(small_kalman, rho):
    stream = small_kalman.simulate(rho)
    q, gains = small_kalman.filtered(stream, rho)
    mean, C, dense_gains = covariance_filter(small_kalman, stream, rho)
    close(gains, dense_gains, rtol=1e-8, atol=1e-8)
    close(q.mean, mean, rtol=1e-7, atol=1e-9)
    close(q.variance, C.diagonal(), rtol=1e-7, atol=0)


def test_kalman_evidences_add_up_to_that_of_the_batch(small_kalman, monkeypatch):
    monkeypatch.setattr(small_kalman, "BROKEN", 7)
    result = small_kalman.static()
    Phi, y = result.stream.Phi.flatten(0, 1), result.stream.y.flatten()
    C = Phi @ (Phi / small_kalman.prior().precision.diagonal()).mT
    C = C + small_kalman.NOISE_SD**2 * torch.eye(len(y), dtype=torch.float64)
    evidence = MultivariateNormal(torch.zeros_like(y), covariance_matrix=C).log_prob(y)
    close(result.gains.sum(), evidence, rtol=1e-10, atol=0)
    close(result.batch_evidence, evidence, rtol=1e-10, atol=0)
    close(result.sequential.mean, result.batch.mean, rtol=1e-8, atol=1e-10)


def test_kalman_taking_a_step_back_is_never_having_seen_it(small_kalman, monkeypatch):
    monkeypatch.setattr(small_kalman, "BROKEN", 7)
    result = small_kalman.static()
    assert result.suspect == 7
    mean, C, _ = covariance_filter(small_kalman, result.stream, 1.0, skip=7)
    close(result.corrected.mean, mean, rtol=1e-7, atol=1e-9)
    close(result.corrected.variance, C.diagonal(), rtol=1e-7, atol=0)


def test_kalman_state_stays_low_rank(example):
    module = example("kalman")
    result = module.drifting()
    n_readings = module.STEPS * module.READINGS
    assert result.static.precision.rank == result.filtered.precision.rank == n_readings
    assert result.gains.sum() > result.static_gains.sum() + 100  # drift is what happened
