"""The log marginal likelihood as a function of its hyperparameters, and the search for its maximum."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from networks import Faint, Problem, problem
from scipy.optimize import minimize
from torch import nn

from curvlin_nn import Laplace, grouped_eigenvalues, prior_search
from curvlin_nn.errors import ConvergenceError, LostPriorError, NoFiniteOptimumError, UnsupportedError

STRUCTURES = ("full", "diag", "kron")


def fitted(p: Problem, structure: str = "kron", subset: object = "all") -> Laplace:
    return Laplace(p.model, p.likelihood, subset, structure).fit(p.batches())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n_priors", [1, 6])
def test_gradients_in_prior_and_noise_are_exact(structure, n_priors):
    la = fitted(problem("mlp", "regression", n=6, n_outputs=2), structure)
    prior = torch.linspace(0.3, 1.5, n_priors).double().requires_grad_()
    sigma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, sigma))
    assert torch.autograd.gradgradcheck(la.log_marginal_likelihood, (prior, sigma))


def test_gradients_reach_a_prior_that_was_set():
    la = fitted(problem("mlp", "classification"))
    log_prior = torch.zeros((), dtype=torch.float64, requires_grad=True)
    la.prior_precision = log_prior.exp()
    la.log_marginal_likelihood().backward()
    h = 1e-5
    expected = (la.log_marginal_likelihood(1 + h) - la.log_marginal_likelihood(1 - h)) / (2 * h)
    torch.testing.assert_close(log_prior.grad, expected.detach(), rtol=1e-6, atol=0)


@functools.cache
def referee_of(structure: str, likelihood: str, n_groups: int) -> tuple[torch.Tensor, float, float]:
    """The referee's optimum of a problem, shared by all starts."""
    regression = likelihood == "regression"
    la = fitted(problem("mlp", likelihood, n=12 if regression else 8), structure)
    return referee(la, torch.zeros(n_groups + regression).double(), with_noise=regression)


def referee(la: Laplace, start: torch.Tensor, with_noise: bool = False) -> tuple[torch.Tensor, float, float]:
    """BFGS by SciPy on the public log marginal likelihood."""

    def loss(u):
        v = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        prior, sigma = (v[:-1].exp(), (v[-1] / 2).exp()) if with_noise else (v.exp(), None)
        value = -la.log_marginal_likelihood(prior, sigma)
        (gradient,) = torch.autograd.grad(value, v)
        return float(value.detach()), gradient.numpy()

    found = minimize(loss, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
    u = torch.tensor(found.x)
    return (u[:-1], float((u[-1] / 2).exp()), -found.fun) if with_noise else (u, 1.0, -found.fun)


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise", "modulewise"])
def test_prior_search_finds_the_same_maximum_from_any_start(structure, prior_structure, start):
    la = fitted(problem("mlp", "classification"), structure)
    groups = {"scalar": 1, "layerwise": 6, "modulewise": 3}[prior_structure]
    expected, _, value = referee_of(structure, "classification", groups)
    la.prior_precision = start
    optimum = la.optimize_prior_precision(prior_structure=prior_structure)
    torch.testing.assert_close(la.prior_precision.reshape(-1), expected.exp(), rtol=1e-5, atol=0)
    assert optimum.log_marginal_likelihood == pytest.approx(value, rel=1e-10)
    assert optimum.gradient_norm < 1e-7
    assert float(la.log_marginal_likelihood()) == pytest.approx(optimum.log_marginal_likelihood, rel=1e-13)


@pytest.mark.parametrize(("prior", "sigma"), [(1e-6, 1e-3), (1.0, 1.0), (1e6, 1e3), (1e6, 1e-3), (1e-6, 1e3)])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
def test_joint_search_of_prior_and_noise_finds_the_same_maximum_from_any_start(
    structure, prior_structure, prior, sigma
):
    la = fitted(problem("mlp", "regression", n=12), structure)
    groups = {"scalar": 1, "layerwise": 6}[prior_structure]
    expected, noise, value = referee_of(structure, "regression", groups)
    la.prior_precision, la.sigma_noise = prior, sigma
    optimum = la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True)
    torch.testing.assert_close(la.prior_precision.reshape(-1), expected.exp(), rtol=1e-5, atol=0)
    assert float(la.sigma_noise) == pytest.approx(noise, rel=1e-6)
    assert optimum.log_marginal_likelihood == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    ("structure", "prior_structure"),
    [*((s, "scalar") for s in STRUCTURES), ("diag", "layerwise"), ("kron", "layerwise")],
)
def test_steps_are_newtons(structure, prior_structure):
    """From ten percent off, the error is squared in each step: 1e-2, 1e-4, 1e-8, 1e-16."""
    la = fitted(problem("mlp", "regression", n=12), structure)
    la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True)
    la.prior_precision, la.sigma_noise = la.prior_precision * 1.1, la.sigma_noise * 1.1
    assert la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True).steps <= 4


@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_sure_step_increases_the_evidence_from_anywhere(structure, prior_structure):
    la = fitted(problem("mlp", "regression", n=12), structure)
    evidence, prior = la._evidence(), la._start(prior_structure)
    for _ in range(50):
        t, tau = 6 * torch.randn(len(prior.precision)).double(), 6 * torch.randn(()).double()
        objective = prior_search._Objective.of(evidence, prior, with_noise=True)
        point = objective.at(t, tau)
        step, step_noise = point.step()
        length = float(torch.maximum(step.abs().max(), step_noise.abs()))
        fraction = min(1.0, prior_search.SURE_STEP / length)
        values = [
            evidence.value(replace(prior, precision=(t + e * step).exp()), ((tau + e * step_noise) / 2).exp())
            for e in (0.0, fraction)
        ]
        assert float(values[1] - values[0]) > 0.25 * fraction * point.slope(step, step_noise)


@functools.cache
def trained_regression(seed: int) -> Problem:
    """Noise at which the terms of log Z, thousands of nats each, nearly cancel."""
    torch.manual_seed(seed)
    x = torch.randn(5000, 2).double()
    y = torch.stack([x[:, 0].sin(), x.prod(1), x.sum(1)], 1) + 0.2 * torch.randn(5000, 3).double()
    return Problem(trained(x, y, nn.functional.mse_loss, 200), "regression", x, y, x[:5])


def trained(x: torch.Tensor, y: torch.Tensor, loss, steps: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)).to(x)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("prior_structure", ["layerwise", "modulewise"])
def test_rounding_of_the_value_does_not_stop_the_search(prior_structure, seed):
    p = trained_regression(seed)
    la = Laplace(p.model, "regression", "all", "full").fit([(p.x, p.y)])
    found = []
    for start in (1e-8, 1.0, 1e8):
        la.prior_precision, la.sigma_noise = start, 1.0
        la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True)
        found.append(la.prior_precision)
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(found[2], found[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise", "modulewise"])
def test_search_succeeds_in_single_precision_with_few_data(prior_structure, structure, n):
    x, y = torch.randn(n, 2), torch.randn(n, 3)
    model = trained(x, y, nn.functional.mse_loss, 200)
    la = Laplace(model, "regression", "all", structure).fit([(x, y)])
    found = []
    for start in (1e-8, 1e8):
        la.prior_precision, la.sigma_noise = start, 1.0
        found.append(la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True))
    torch.testing.assert_close(found[0].prior_precision, found[1].prior_precision, rtol=1e-6, atol=0)


@functools.cache
def single_and_double(structure: str) -> tuple[Laplace, Laplace]:
    """The same float32 weights and data, fitted in float32 and in float64; H has little rank."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 2), torch.randint(3, (30,))
    model = trained(x, y, nn.functional.cross_entropy, 100)
    single = Laplace(model, "classification", "all", structure).fit([(x, y)])
    double = Laplace(copy.deepcopy(model).double(), "classification", "all", structure)
    return single, double.fit([(x.double(), y)])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n_groups", [1, 6])
@pytest.mark.parametrize("prior", [1e-8, 1e-6, 1e-3, 1.0, 1e4])
def test_single_precision_is_as_right_as_double_at_any_prior(structure, n_groups, prior):
    single, double = single_and_double(structure)
    single.prior_precision = double.prior_precision = torch.full((n_groups,), prior).double()
    value, expected = float(single.log_marginal_likelihood()), float(double.log_marginal_likelihood())
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-4)
    x = torch.linspace(-2, 2, 8).reshape(4, 2)
    mean, variance = single._predictive().mean_and_variance(x)
    expected_mean, expected_variance = double._predictive().mean_and_variance(x.double())
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("n_groups", [1, 6])
def test_evidence_and_predictions_refuse_a_prior_that_rounding_hides(structure, n_groups):
    """Blocks that are dense have no digits left for it: all of "full", the biases of "kron"."""
    for la in single_and_double(structure):
        la.prior_precision = torch.full((n_groups,), 1e-18).double()
        x = torch.zeros(1, 2, dtype=la.mean.dtype)
        for ask in (la.log_marginal_likelihood, lambda la=la, x=x: la(x)):
            with pytest.raises(LostPriorError, match="rounding of the curvature; raise prior_precision"):
                ask()


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_search_accounts_for_temperature_and_prior_mean(temperature):
    p = problem("cnn", "regression", n=12)
    la = Laplace(p.model, p.likelihood, "all", "kron", temperature=temperature, prior_mean=0.05).fit(
        p.batches()
    )
    expected, noise, _ = referee(la, torch.zeros(2).double(), with_noise=True)
    la.optimize_prior_precision(optimize_noise=True)
    assert float(la.prior_precision) == pytest.approx(float(expected.exp()), rel=1e-5)
    assert float(la.sigma_noise) == pytest.approx(noise, rel=1e-6)


def test_diagonal_prior_has_a_closed_form_for_the_diagonal_structure():
    """Per coordinate: gamma = h / (h + d) = d s, so d solves s d^2 + s h d - h = 0."""
    p = problem("mlp", "regression")
    p.model[3] = nn.Tanh()  # no dead units: each coordinate has curvature
    la = fitted(p, "diag")
    la.optimize_prior_precision(prior_structure="diag")
    h, s = la.curvature.diagonal(), la.mean.square()
    expected = (-s * h + torch.sqrt((s * h) ** 2 + 4 * s * h)) / (2 * s)
    torch.testing.assert_close(la.prior_precision, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_there_is_no_finite_optimum_when_parameters_equal_the_prior_mean(structure):
    p = problem("mlp", "classification")
    with torch.no_grad():
        p.model[2].bias.zero_()
    la = fitted(p, structure)
    before = la.prior_precision
    la.optimize_prior_precision()  # together with the others there is one
    la.prior_precision = before
    with pytest.raises(NoFiniteOptimumError, match=r"parameter '2.bias' equals the prior mean exactly"):
        la.optimize_prior_precision(prior_structure="layerwise")
    la.prior_mean = la.mean
    with pytest.raises(NoFiniteOptimumError, match="the parameter vector equals the prior mean exactly"):
        la.optimize_prior_precision()
    assert la.prior_precision is before


def test_there_is_no_finite_optimum_without_curvature():
    p = problem("mlp", "classification")
    p.model.register_module("spare", nn.Linear(3, 2).double())
    p.model.forward = lambda x: nn.Sequential(*list(p.model)[:5])(x)
    la = fitted(p)
    with pytest.raises(NoFiniteOptimumError, match=r"the curvature of parameter 'spare.weight' is zero"):
        la.optimize_prior_precision(prior_structure="layerwise")


def test_there_is_no_finite_noise_when_the_fit_is_perfect():
    p = problem("mlp", "regression")
    perfect = Problem(p.model, "regression", p.x, p.model(p.x).detach(), p.x_test)
    la = Laplace(p.model, "regression", "all", "kron").fit([(p.x, perfect.y)])
    with pytest.raises(NoFiniteOptimumError, match="the residuals are all zero"):
        la.optimize_prior_precision(optimize_noise=True)


@pytest.mark.parametrize("influence", [1e-12, 1e-17])
def test_parameters_without_influence_do_not_stop_the_search(influence):
    """The gradient in their precision is the rounding of a difference."""
    p = problem("mlp", "regression", n=12)
    model = Faint(influence).double()
    la = Laplace(model, "regression", "all", "full").fit([(p.x, p.y)])
    found = la.optimize_prior_precision(prior_structure="layerwise", optimize_noise=True)
    other = Laplace(model, "regression", ["layer"], "full").fit([(p.x, p.y)])
    expected = other.optimize_prior_precision(prior_structure="layerwise", optimize_noise=True)
    assert found.sigma_noise == pytest.approx(expected.sigma_noise, rel=1e-7)
    torch.testing.assert_close(la.prior_precision[1:], other.prior_precision, rtol=1e-7, atol=0)


def test_a_search_that_is_cut_short_says_so_and_changes_nothing():
    la = fitted(problem("mlp", "classification"))
    la.prior_precision = 1e6
    with pytest.raises(ConvergenceError, match="did not converge in 3 steps"):
        la.optimize_prior_precision(max_steps=3)
    assert float(la.prior_precision) == 1e6


def test_a_prior_structure_that_cuts_through_blocks_is_refused():
    la = fitted(problem("mlp", "classification"), "kron")
    with pytest.raises(UnsupportedError, match="cuts through blocks of the curvature"):
        la.optimize_prior_precision(prior_structure="diag")


def test_a_prior_given_as_an_operator_is_not_optimised():
    la = fitted(problem("mlp", "classification"), "full")
    la.prior_precision = la.posterior_precision
    with pytest.raises(UnsupportedError, match="a prior given as an operator cannot be optimised"):
        la.optimize_prior_precision()


def test_full_curvature_of_layers_with_and_without_weight_sharing_is_of_one_jacobian():
    """In float32 they fold differently; what is left of one must not make the sum indefinite."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    x, y = torch.randn(20, 2, 6, 6), torch.randint(3, (20,))
    results = []
    for dtype in (torch.float32, torch.float64):
        la = Laplace(model.to(dtype), "classification", "all", "full").fit([(x.to(dtype), y)])
        la.optimize_prior_precision()
        results.append((float(la.log_marginal_likelihood()), float(la.prior_precision.mean())))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("bins", [0.2, 5])
@pytest.mark.parametrize(
    ("structure", "prior_structure"), [("kron", "layerwise"), ("diag", "scalar"), ("full", "scalar")]
)
def test_a_search_among_binned_eigenvalues_ends_at_the_same_maximum(
    monkeypatch, structure, prior_structure, bins
):
    p = problem("cnn", "regression", n=12)
    la = fitted(p, structure)
    expected = la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True)
    monkeypatch.setattr(grouped_eigenvalues, "BINS_PER_UNIT", bins)
    la.fit(p.batches())
    eigenvalues = prior_search._Objective.of(la._evidence(), la._start(prior_structure), True).eigenvalues
    binned = eigenvalues.binned
    if bins == 0.2 and prior_structure == "scalar":
        assert len(binned.inverses) < len(eigenvalues.inverses) / 8
    if binned is not None:
        assert float(binned.counts.sum()) == len(eigenvalues.inverses)
        total = (binned.counts * binned.inverses).sum()
        torch.testing.assert_close(total, eigenvalues.inverses.sum(), rtol=1e-12, atol=0)
    la.prior_precision, la.sigma_noise = 1e-3, 30.0
    found = la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True)
    torch.testing.assert_close(found.prior_precision, expected.prior_precision, rtol=1e-7, atol=0)
    assert found.sigma_noise == pytest.approx(expected.sigma_noise, rel=1e-7)
