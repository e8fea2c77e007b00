"""`Laplace` with every family: evidence by the definition, predictions by quadrature or in closed form."""

import math

import numpy as np
import pytest
import torch
from likelihood_cases import CASES, SIGMA, generator, ggn, network, tensor
from network_oracle import jacobian
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, Poisson

from curvlin_nn import Laplace
from curvlin_nn.errors import OutputError, UnsupportedError
from curvlin_nn.likelihoods import Categorical, Custom, Gaussian, HeteroscedasticGaussian

DELTA = 0.6


class Setting:
    """A network with data of one family, its posterior, and the same by dense matrices."""

    def __init__(self, name: str, shape: tuple[int, ...], likelihood, **options) -> None:
        self.case, self.model = CASES[name], network(shape)
        self.x, self.x_test = torch.randn(8, 3).double(), torch.randn(4, 3).double()
        self.y = (
            self.case.targets(8)[..., : shape[-1]] if name in ("bits", "counts") else self.case.targets(8)
        )
        self.la = Laplace(self.model, likelihood, "all", "full", prior_precision=DELTA, **options)
        self.la.fit([(self.x[:5], self.y[:5]), (self.x[5:], self.y[5:])])
        self.H = ggn(self.case, self.model, self.x, self.y)

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs at the test inputs."""
        flat = nn.Sequential(self.model, nn.Flatten())
        J = jacobian(flat, self.x_test)
        inverse = torch.linalg.inv(scale * self.H + DELTA * torch.eye(len(self.H)).double())
        return flat(self.x_test).detach(), J @ inverse @ J.mT

    def evidence(self, log_likelihood: Tensor) -> Tensor:
        theta = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        logdet = torch.logdet(torch.eye(len(theta)).double() + self.H / DELTA)
        return log_likelihood - DELTA * theta.square().sum() / 2 - logdet / 2


LOG_LIKELIHOODS = {
    "binary": lambda f, y: Bernoulli(logits=f).log_prob(y),
    "poisson": lambda f, y: Poisson(f.exp()).log_prob(y.double()),
    "heteroscedastic": lambda f, y: Normal(f[:, :2] / f[:, 2:].exp(), (-f[:, 2:] / 2).exp()).log_prob(y),
    "reward_modeling": lambda f, y: torch.log_softmax(f, -1).gather(1, y[:, None]),
}

SETTINGS = {
    "binary": ("bits", (1,)),
    "poisson": ("counts", (2,)),
    "heteroscedastic": ("heteroscedastic", (4,)),
    "reward_modeling": ("rewards", (2,)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_log_marginal_likelihood_equals_the_definition(name):
    s = Setting(*SETTINGS[name], name)
    log_p = LOG_LIKELIHOODS[name](s.model(s.x).detach(), s.y).sum()
    torch.testing.assert_close(s.la.log_marginal_likelihood(), s.evidence(log_p), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_prior_precision_can_be_optimised(name):
    """At the optimum no other value has more evidence."""
    s = Setting(*SETTINGS[name], name)
    best = s.la.optimize_prior_precision().prior_precision
    top = float(s.la.log_marginal_likelihood())
    assert all(float(s.la.log_marginal_likelihood(best.squeeze() * factor)) < top for factor in (0.9, 1.1))


def test_binary_predictions_are_probabilities_by_the_scalar_probit():
    s = Setting("bits", (1,), "binary")
    mean, covariance = s.moments()
    found = s.la(s.x_test)
    assert found.shape == (4, 1)
    expected = torch.sigmoid(mean / torch.sqrt(1 + math.pi / 8 * covariance[..., 0]))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    nodes, weights = hermite()
    for n in range(4):  # an approximation, of two digits or so
        values = torch.sigmoid(mean[n] + covariance[n, 0, 0].sqrt() * nodes)
        assert abs(float((weights * values).sum() - found[n])) < 0.02


def hermite(size: int = 80) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal distribution."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(size)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def test_rates_are_expected_exactly():
    s = Setting("counts", (2,), "poisson")
    mean, covariance = s.moments()
    nodes, weights = hermite()
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    expected = (weights * torch.exp(mean[..., None] + deviation[..., None] * nodes)).sum(-1)
    torch.testing.assert_close(s.la(s.x_test), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(s.la(s.x_test, link_approx="exact"), expected, rtol=1e-10, atol=0)


def test_moments_of_unknown_noise_are_those_of_the_integral():
    """``mu = f_1 exp(-f_2)`` of both targets, over all four correlated outputs; noise has the mean ``E exp(-f_2)``."""
    s = Setting("heteroscedastic", (4,), "heteroscedastic")
    mean, covariance = s.moments()
    nodes, weights = hermite(24)
    grid, weights = torch.cartesian_prod(*[nodes] * 4), torch.cartesian_prod(*[weights] * 4).prod(-1)
    found = s.la(s.x_test)
    noisy = s.la(s.x_test, observation_noise=True)
    for n in range(4):
        f = mean[n] + grid @ torch.linalg.cholesky(covariance[n]).mT
        mu, noise = f[:, :2] * torch.exp(-f[:, 2:]), torch.exp(-f[:, 2:])
        first = weights @ mu
        spread = torch.einsum("m,mi,mj->ij", weights, mu - first, mu - first)
        tight = {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close((found[0][n], found[1][n]), (first, spread), **tight)
        torch.testing.assert_close(noisy[1][n], spread + torch.diag(weights @ noise), **tight)
    marginal = s.la(s.x_test, diagonal_output=True)[1]
    torch.testing.assert_close(marginal, found[1].diagonal(dim1=1, dim2=2), rtol=1e-12, atol=0)
    with pytest.raises(
        UnsupportedError, match="joint is not supported for heteroscedastic; use functional_samples"
    ):
        s.la(s.x_test, joint=True)


def test_moments_of_unknown_noise_with_little_uncertainty_are_those_of_the_linearisation():
    """``Var mu = (1, -mu) V (1, -mu)^T / tau`` with all its digits, where mu^2 is 10^8 times and V 10^-14."""
    family = HeteroscedasticGaussian()
    mean, V = tensor(1e4, 0.0)[None], torch.diag(tensor(3e-14, 1e-22))[None]
    found_mean, found = family.moments(mean, V)
    torch.testing.assert_close(found_mean, mean[:, :1], rtol=1e-13, atol=0)
    torch.testing.assert_close(found, tensor(4e-14)[None, None], rtol=1e-11, atol=0)


def test_predictive_samples_with_noise_are_draws_of_targets():
    """Their mean and covariance are the moments; z-scores over 20,000 draws."""
    s = Setting("heteroscedastic", (4,), "heteroscedastic")
    draws = s.la.predictive_samples(s.x_test, 20000, generator(), observation_noise=True)
    mean, covariance = s.la(s.x_test, observation_noise=True)
    deviation = draws - mean
    for found, expected in ((draws, mean), (torch.einsum("sni,snj->snij", deviation, deviation), covariance)):
        z = (found.mean(0) - expected) / (found.std(0) / len(found) ** 0.5)
        assert float(z.abs().max()) < 4


@pytest.mark.parametrize("name", ["binary", "poisson"])
def test_monte_carlo_links_converge_to_the_expectation(name):
    """z-scores over 20,000 draws, against the mean of another draw's own links."""
    s = Setting(*SETTINGS[name], name)
    n = 20000
    found = s.la(s.x_test, link_approx="mc", n_samples=n, generator=generator(1))
    links = s.la.predictive_samples(s.x_test, n_samples=n, generator=generator(2))
    assert found.shape == links.shape[1:]
    z = (found - links.mean(0)) / (links.std(0) * (2 / n) ** 0.5)
    assert float(z.abs().max()) < 4
    if name == "poisson":
        z = (found - s.la(s.x_test)) / (links.std(0) / n**0.5)
        assert float(z.abs().max()) < 4


def test_rewards_are_predicted_by_their_moments():
    s = Setting("rewards", (2,), "reward_modeling")
    for found, expected in zip(s.la(s.x_test), s.moments(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_noise_covariance_scales_with_the_noise_and_is_added_to_predictions():
    s = Setting("covariance", (3,), Gaussian(covariance=SIGMA), sigma_noise=0.5)
    mean, covariance = s.moments(scale=4.0)
    noise = 0.25 * SIGMA
    joint = s.la(s.x_test, joint=True)[1]
    tight = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(s.la(s.x_test, observation_noise=True), (mean, covariance + noise), **tight)
    marginal = covariance.diagonal(dim1=1, dim2=2) + noise.diagonal()
    found = s.la(s.x_test, diagonal_output=True, observation_noise=True)[1]
    torch.testing.assert_close(found, marginal, **tight)
    noisy = s.la(s.x_test, joint=True, observation_noise=True)[1]
    torch.testing.assert_close(noisy - joint, torch.block_diag(*[noise] * 4), rtol=1e-9, atol=1e-12)
    log_p = MultivariateNormal(s.model(s.x).detach(), noise).log_prob(s.y).sum()
    s.H = 4 * s.H
    torch.testing.assert_close(s.la.log_marginal_likelihood(), s.evidence(log_p), rtol=1e-10, atol=0)
    f = s.la.functional_samples(s.x_test, 4000, generator())
    drawn = s.la.predictive_samples(s.x_test, 4000, generator(), observation_noise=True) - f
    products = torch.einsum("snc,snd->sncd", drawn, drawn).flatten(0, 1)
    z = (products.mean(0) - noise) / (products.std(0) / len(products) ** 0.5)
    assert float(z.abs().max()) < 4


def test_each_token_has_probabilities_of_its_own():
    """In the shape of the outputs, wherever their classes are."""
    tokens, pixels = (Setting(name, CASES[name].shape, CASES[name].make()) for name in ("tokens", "pixels"))
    for s, axis in ((tokens, 2), (pixels, 1)):
        mean, covariance = s.moments()
        shape = (4, *s.case.shape)
        variance = covariance.diagonal(dim1=1, dim2=2).reshape(shape)
        expected = torch.softmax(mean.reshape(shape) / torch.sqrt(1 + math.pi / 8 * variance), dim=axis)
        torch.testing.assert_close(s.la(s.x_test), expected, rtol=1e-9, atol=1e-12)
        links = s.la.predictive_samples(s.x_test, 2000, generator(1))
        functions = s.la.functional_samples(s.x_test, 2000, generator(1)).reshape(2000, *shape)
        torch.testing.assert_close(links, torch.softmax(functions, dim=axis + 1), rtol=1e-12, atol=1e-14)
        found = s.la(s.x_test, link_approx="mc", n_samples=2000, generator=generator(2))
        z = (found - links.mean(0)) / (links.std(0) * (2 / 2000) ** 0.5)
        assert float(z.abs().max()) < 4


def test_targets_at_every_place_have_their_own_noise():
    """Outputs ``(N, 2, 4)``: for two places, f_1 of two targets and f_2 of both; as for one place of four targets."""
    s = Setting("heteroscedastic", (4,), "heteroscedastic")
    places = nn.Sequential(*network((8,))[:3], nn.Unflatten(1, (2, 4))).double()
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # f_1 at both places, then f_2
    flat = nn.Sequential(*network((8,))[:3]).double()
    with torch.no_grad():
        flat[2].weight.copy_(places[2].weight[order])
        flat[2].bias.copy_(places[2].bias[order])
    y = torch.randn(8, 2, 2).double()
    options = {"hessian_structure": "full", "subset_of_weights": "all"}
    one = Laplace(places, "heteroscedastic", **options).fit([(s.x, y)])
    other = Laplace(flat, "heteroscedastic", **options).fit([(s.x, y.flatten(1))])
    torch.testing.assert_close(
        one.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=1e-10, atol=0
    )
    for noise in (False, True):
        found, expected = (la(s.x_test, observation_noise=noise) for la in (one, other))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    draws = one.predictive_samples(s.x_test, 20000, generator(), observation_noise=True)
    z = (draws.mean(0) - found[0]) / (draws.std(0) / 20000**0.5)
    assert float(z.abs().max()) < 4


class Tokens(nn.Module):
    """Each token by itself; outputs ``(N, T, C)``, or ``(N, C, T)``, or a row of all."""

    def __init__(self, n_outputs: int, form: str = "last") -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(3, 4), nn.Linear(4, n_outputs), form

    def forward(self, x: Tensor) -> Tensor:
        f = self.b(torch.tanh(self.a(x)))
        return {"last": f, "second": f.mT, "row": f.flatten(1)}[self.form]


SEQUENCES = {
    "classes": (Tokens(3), "classification", lambda: torch.randint(3, (6, 4)), 1),
    "classes second": (Tokens(3, "second"), Categorical(class_dim=1), lambda: torch.randint(3, (6, 4)), 2),
    "bits": (Tokens(2), "binary", lambda: torch.randint(2, (6, 4, 2)).double(), 1),
    "counts": (Tokens(2), "poisson", lambda: torch.randint(3, (6, 4, 2)).double(), 1),
}


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("length", [1, 3, 7])
def test_sequences_of_another_length_than_in_fit(kind, length):
    """Tokens do not see each other: a part of a sequence is predicted as it is in the whole."""
    torch.manual_seed(4)
    model, likelihood, targets, axis = SEQUENCES[kind]
    x, y, x_test = torch.randn(6, 4, 3).double(), targets(), torch.randn(5, 7, 3).double()
    la = Laplace(model.double(), likelihood, "all", "kron").fit([(x, y)])
    whole, part = la(x_test), la(x_test[:, :length])
    torch.testing.assert_close(part, whole.narrow(axis, 0, length), rtol=1e-9, atol=1e-12)
    draws = la.predictive_samples(x_test[:, :length], 3, generator())
    assert draws.shape == (3, *part.shape)
    assert la(x).shape[axis] == 4


def test_regressions_and_noise_over_sequences_of_another_length_than_in_fit():
    torch.manual_seed(4)
    x, y, x_test = torch.randn(6, 4, 3).double(), torch.randn(6, 4, 2).double(), torch.randn(5, 7, 3).double()
    la = Laplace(Tokens(2).double(), Gaussian(covariance=[[2.0, 1.0], [1.0, 3.0]]), "all", "full").fit(
        [(x, y)]
    )
    mean, covariance = la(x_test, observation_noise=True)
    part = la(x_test[:, :3], observation_noise=True)
    torch.testing.assert_close(part, (mean[:, :6], covariance[:, :6, :6]), rtol=1e-9, atol=1e-12)
    joint = la(x_test[:, :3], joint=True, observation_noise=True)[1].view(5, 6, 5, 6)
    torch.testing.assert_close(joint[range(5), :, range(5)], part[1], rtol=1e-9, atol=1e-12)
    variances = Laplace(Tokens(4).double(), "heteroscedastic", "all", "full").fit([(x, y)])
    mean, covariance = variances(x_test)
    of_tokens = mean[:, :6], covariance[:, :6, :6]
    torch.testing.assert_close(variances(x_test[:, :3]), of_tokens, rtol=1e-9, atol=1e-12)


def test_outputs_of_another_size_than_in_fit_are_refused():
    x, y = torch.randn(6, 4, 3), torch.randint(2, (6, 4, 2))
    la = Laplace(Tokens(2, "row"), "binary", "all").fit([(x, y.flatten(1).float())])
    with pytest.raises(OutputError, match=r"must have shape \(N, 8\) as in fit.*, found \(N, 6\)"):
        la(x[:, :3])
    classes = Laplace(Growing(), "classification", "all").fit([(x, y[..., 0])])
    with pytest.raises(OutputError, match=r"must have shape \(N, 4, 5\) as in fit.*, found \(N, 3, 4\)"):
        classes(x[:, :3])


class Growing(nn.Module):
    """As many classes as tokens, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[..., : x.shape[1] + 1]


def test_links_that_a_family_does_not_have_are_refused():
    s = Setting("counts", (2,), "poisson")
    with pytest.raises(
        UnsupportedError, match="link_approx='bridge' is not supported for poisson; expected one of 'ex"
    ):
        s.la(s.x_test, link_approx="bridge")
    custom = Custom(lambda f, y: -(f - y).square(), event_ndim=0, link=lambda f: 2 * f)
    la = Laplace(s.model, custom, "all", "full").fit([(s.x, s.y.double())])
    with pytest.raises(
        UnsupportedError, match="link_approx='probit' is not supported for custom; expected one of 'mc'"
    ):
        la(s.x_test)
    z = (la(s.x_test, link_approx="mc", n_samples=4000, generator=generator()) - 2 * s.model(s.x_test)) / (
        2 * la.functional_samples(s.x_test, 4000, generator()).std(0) / 4000**0.5
    )
    assert float(z.detach().abs().max()) < 4


def test_a_loss_module_is_a_likelihood():
    s = Setting("bits", (1,), "binary")
    la = Laplace(s.model, nn.BCEWithLogitsLoss(), "all", "full", prior_precision=DELTA).fit([(s.x, s.y)])
    torch.testing.assert_close(la(s.x_test), s.la(s.x_test), rtol=1e-12, atol=0)
