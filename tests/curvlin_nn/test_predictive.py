"""Random predictions: the right distribution, and the same draws from the same generator."""

import math

import network_oracle as oracle
import numpy as np
import pytest
import torch
from networks import Problem, problem

from curvlin_nn import Laplace, predictive

STRUCTURES = ("full", "diag", "kron")


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def fitted(p: Problem, structure: str = "kron", **options) -> Laplace:
    return Laplace(p.model, p.likelihood, "all", structure, prior_precision=0.5, **options).fit(p.batches())


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_functional_samples_are_the_linearised_network_at_posterior_samples(kind, structure):
    """Exactly, draw by draw; so their joint covariance over inputs is J P^-1 J^T."""
    p = problem(kind, "regression")
    la = fitted(p, structure)
    theta = la.sample(6, generator=generator())
    J = oracle.jacobian(p.model, p.x_test)
    expected = p.model(p.x_test).detach() + torch.einsum("ncp,sp->snc", J, theta - la.mean)
    found = la.functional_samples(p.x_test, n_samples=6, generator=generator())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_functional_samples_have_the_joint_covariance_over_inputs(structure):
    """z-scores of every entry of the empirical covariance of 4,000 draws; |z| < 5 for each of 225."""
    p = problem("mlp", "regression")
    la = fitted(p, structure)
    mean, covariance = la(p.x_test, joint=True)
    draws = la.functional_samples(p.x_test, n_samples=4000, generator=generator()).flatten(1) - mean
    empirical = draws.T @ draws / 4000
    diagonal = covariance.diagonal()
    deviation = torch.sqrt((covariance.square() + torch.outer(diagonal, diagonal)) / 4000)
    assert ((empirical - covariance).abs() / deviation).max() < 5
    correlation = covariance / torch.sqrt(torch.outer(diagonal, diagonal))
    assert (correlation[:3, 3:].abs() > 0.3).any()  # there is something to get wrong between inputs


def test_samples_from_one_generator_state_are_the_same_functions_at_other_inputs():
    p = problem("mlp", "regression")
    la = fitted(p)
    together = la.functional_samples(p.x_test, 4, generator=generator())
    apart = torch.cat([la.functional_samples(x, 4, generator=generator()) for x in p.x_test.split(2)], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-13)


def test_chunks_change_nothing(monkeypatch):
    p = problem("cnn", "regression")
    la = fitted(p)
    calls = [
        lambda: la(p.x_test),
        lambda: la(p.x_test, diagonal_output=True),
        lambda: (la.functional_samples(p.x_test, 5, generator=generator()),),
    ]
    whole = [call() for call in calls]
    monkeypatch.setattr(predictive.linearised, "FEATURE_BUDGET", 1)
    for call, expected in zip(calls, whole, strict=True):
        torch.testing.assert_close(call(), expected, rtol=1e-12, atol=1e-14)


def test_draws_in_parts_have_the_right_number_and_are_reproducible(monkeypatch):
    p = problem("mlp", "regression")
    la = fitted(p)
    monkeypatch.setattr(predictive.draws, "DRAW_BUDGET", 2 * la.n_params)
    first = la.functional_samples(p.x_test, 5, generator=generator())
    assert first.shape == (5, 5, 3)
    assert len(first.unique(dim=0)) == 5
    assert torch.equal(first, la.functional_samples(p.x_test, 5, generator=generator()))


@pytest.mark.parametrize("diagonal_output", [False, True])
def test_monte_carlo_link_converges_to_the_integral(diagonal_output):
    """Two classes: E softmax is a one-dimensional integral of the logistic function, by Gauss-Hermite."""
    p = problem("mlp", "classification", n_outputs=2)
    la = fitted(p, "full")
    H = oracle.curvature(p.model, p.x, p.y, "classification", "full")
    joint = oracle.covariance(p.model, p.x_test, H + 0.5 * eye(len(H)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    found = la(
        p.x_test, link_approx="mc", n_samples=20000, generator=generator(), diagonal_output=diagonal_output
    )
    for n, f in enumerate(p.model(p.x_test).detach()):
        S = joint[2 * n : 2 * n + 2, 2 * n : 2 * n + 2]
        if diagonal_output:
            S = torch.diag(S.diagonal())
        scale = math.sqrt(float(S[0, 0] + S[1, 1] - 2 * S[0, 1]))
        values = 1 / (1 + np.exp(-(float(f[0] - f[1]) + scale * nodes)))
        mean = (weights * values).sum() / weights.sum()
        variance = (weights * values**2).sum() / weights.sum() - mean**2
        assert abs(float(found[n, 0]) - mean) < 4.5 * math.sqrt(variance / 20000)
    torch.testing.assert_close(found.sum(1), torch.ones(5).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda la, x, g: la(x, link_approx="mc", n_samples=3, generator=g),
        lambda la, x, g: la.sample(3, generator=g),
        lambda la, x, g: la.functional_samples(x, 3, generator=g),
        lambda la, x, g: la.predictive_samples(x, 3, generator=g),
        lambda la, x, g: la(x, "nn", n_samples=3, generator=g),
        lambda la, x, g: la.functional_samples(x, 3, generator=g, pred_type="nn"),
    ],
)
def test_generators_are_obeyed_and_the_default_one_is_used_and_not_reseeded(call):
    p = problem("mlp", "classification")
    la = fitted(p)
    before = torch.get_rng_state()
    seeded = call(la, p.x_test, generator(1))
    assert torch.equal(seeded, call(la, p.x_test, generator(1)))
    assert not torch.equal(seeded, call(la, p.x_test, generator(2)))
    assert torch.equal(before, torch.get_rng_state())
    first = call(la, p.x_test, None)
    assert not torch.equal(first, call(la, p.x_test, None))
    torch.set_rng_state(before)
    assert torch.equal(first, call(la, p.x_test, None))


def test_posterior_samples_have_the_posterior_precision():
    """(theta - mean)^T P (theta - mean) is chi-squared with P degrees of freedom, for each of 500 draws."""
    p = problem("mlp", "classification")
    la = fitted(p)
    draws = la.sample(500, generator=generator()) - la.mean
    quadratic = torch.einsum("sp,pq,sq->s", draws, la.posterior_precision.to_dense(), draws)
    z = (quadratic.mean() - la.n_params) / math.sqrt(2 * la.n_params / 500)
    assert abs(float(z)) < 4


def test_predictive_samples_are_links_of_functional_samples_and_carry_noise_on_request():
    p = problem("mlp", "classification")
    la = fitted(p)
    logits = la.functional_samples(p.x_test, 4, generator=generator())
    probabilities = la.predictive_samples(p.x_test, 4, generator=generator())
    torch.testing.assert_close(probabilities, torch.softmax(logits, -1), rtol=0, atol=0)
    p = problem("mlp", "regression")
    la = fitted(p, sigma_noise=0.3)
    f = la.functional_samples(p.x_test, 2000, generator=generator())
    noisy = la.predictive_samples(p.x_test, 2000, generator=generator(), observation_noise=True)
    torch.testing.assert_close(
        la.predictive_samples(p.x_test, 2000, generator=generator()), f, rtol=0, atol=0
    )
    noise = (noisy - f).flatten()
    assert abs(float(noise.square().mean()) / 0.09 - 1) < 4.5 * math.sqrt(2 / len(noise))


def test_singular_output_covariances_can_be_drawn_from():
    direction = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    covariance = torch.outer(direction, direction).expand(2, 3, 3)
    draws = predictive.draw(torch.zeros(2, 3).double(), covariance, 50, generator())
    torch.testing.assert_close(draws[..., 0], -draws[..., 1], rtol=0, atol=1e-7)
    torch.testing.assert_close(draws[..., 2], torch.zeros(50, 2).double(), rtol=0, atol=1e-7)
    assert draws.std() > 0.5
