"""`Laplace.predict`: means as of a call, and uncertainty taken apart as defined."""

import dataclasses
import math

import pytest
import torch
from networks import Problem, problem
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Poisson

from curvlin_nn import Laplace, likelihoods
from curvlin_nn.errors import NotFittedError, UnsupportedError
from curvlin_nn.likelihoods import Custom
from curvlin_nn.predictive import counts


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitted(p: Problem, structure: str = "full", **options) -> Laplace:
    return Laplace(p.model, p.likelihood, "all", structure, prior_precision=2.0, **options).fit(p.batches())


def family(likelihood: str, n_outputs: int, targets: Tensor) -> tuple[Laplace, Tensor]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs)).double()
    x = torch.randn(len(targets), 3).double()
    return Laplace(model, likelihood, "all", "full", prior_precision=4.0).fit([(x, targets)]), x


KINDS = ["glm", "nn"]


@pytest.mark.parametrize("pred_type", KINDS)
def test_regression_is_split_into_noise_and_model(pred_type):
    p = problem("mlp", "regression")
    la = fitted(p, sigma_noise=0.4)
    found = la.predict(p.x_test, pred_type, n_samples=50, generator=generator())
    mean, covariance = la(p.x_test, pred_type, n_samples=50, generator=generator())
    torch.testing.assert_close((found.mean, found.covariance), (mean, covariance), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.epistemic, found.variance, rtol=0, atol=0)
    torch.testing.assert_close(
        found.aleatoric, torch.full((5, 3), 0.16, dtype=torch.float64), rtol=1e-12, atol=0
    )
    noise = 0.16 * torch.eye(3).double()
    total = MultivariateNormal(mean, covariance + noise).entropy()
    torch.testing.assert_close(found.entropy, total, rtol=1e-11, atol=0)
    expected = total - MultivariateNormal(torch.zeros(3).double(), noise).entropy()
    torch.testing.assert_close(found.mutual_information, expected, rtol=1e-10, atol=0)
    assert bool((found.mutual_information > 0).all())


@pytest.mark.parametrize("pred_type", KINDS)
def test_entropies_of_classes_are_those_of_the_draws(pred_type):
    p = problem("mlp", "classification")
    la = fitted(p)
    found = la.predict(p.x_test, pred_type, n_samples=30, generator=generator())
    draws = found.samples
    assert draws.shape == (30, 5, 3)
    total, expected = Categorical(draws.mean(0)).entropy(), Categorical(draws).entropy().mean(0)
    torch.testing.assert_close(found.entropy, total, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.aleatoric, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.epistemic, total - expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.mutual_information, total - expected, rtol=1e-8, atol=0)
    assert bool((found.epistemic > 0).all())
    covariance = torch.stack([torch.cov(draws[:, n].T) for n in range(5)])
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2), rtol=1e-10, atol=1e-14)
    expected = la(p.x_test, pred_type, n_samples=30, generator=generator())
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("link", ["probit", "mean_field", "bridge", "mc"])
def test_the_mean_is_that_of_a_call(link):
    p = problem("mlp", "classification")
    la = fitted(p)
    found = la.predict(p.x_test, link_approx=link, n_samples=4000, generator=generator())
    if link == "mc":
        assert torch.equal(found.mean, found.samples.mean(0))
        expected = la(p.x_test, link_approx="mc", n_samples=4000, generator=generator(9))
        z = (found.mean - expected) / (found.samples.std(0) * (2 / 4000) ** 0.5)
        assert z.abs().max() < 4
    else:
        torch.testing.assert_close(found.mean, la(p.x_test, link_approx=link), rtol=1e-12, atol=0)


def test_draws_of_outputs_have_the_gaussian_of_the_outputs():
    p = problem("mlp", "classification")
    found = fitted(p).predict(p.x_test, n_samples=4000, generator=generator())
    z = (found.outputs.mean(0) - found.output_mean) / found.outputs.std(0) * 4000**0.5
    assert z.abs().max() < 4
    for n in range(5):
        V = found.output_covariance[n]
        deviation = torch.sqrt((V.square() + torch.outer(V.diagonal(), V.diagonal())) / 4000)
        assert ((torch.cov(found.outputs[:, n].T) - V) / deviation).abs().max() < 4


def test_the_generator_decides_when_asked_and_not_when_drawn():
    p = problem("mlp", "classification")
    la, source = fitted(p), generator()
    first, second = (la.predict(p.x_test, generator=source) for _ in range(2))
    torch.randn(100, generator=source)
    later = second.samples
    assert not torch.equal(first.samples, later)
    source = generator()
    la.predict(p.x_test, generator=source)
    assert torch.equal(la.predict(p.x_test, generator=source).samples, later)
    before = torch.get_rng_state()
    assert torch.equal(la.predict(p.x_test, generator=generator()).samples, first.samples)
    assert torch.equal(before, torch.get_rng_state())
    default = la.predict(p.x_test)
    state = torch.get_rng_state()
    assert not torch.equal(default.samples, la.predict(p.x_test).samples)
    torch.set_rng_state(before)
    again = la.predict(p.x_test)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(again.samples, default.samples)


def test_a_prediction_is_frozen_and_has_a_length():
    p = problem("mlp", "classification")
    found = fitted(p).predict(p.x_test)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mean = None
    assert len(found) == 5 and repr(found) == "Prediction(classification, mean of shape (5, 3))"


@pytest.mark.parametrize("pred_type", KINDS)
def test_bits(pred_type):
    la, x = family("binary", 2, torch.randint(2, (6, 2)).double())
    found = la.predict(x, pred_type, n_samples=40, generator=generator())
    draws = found.samples
    total, expected = Bernoulli(draws.mean(0)).entropy(), Bernoulli(draws).entropy().mean(0)
    torch.testing.assert_close(found.probabilities, found.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.entropy, total, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.aleatoric, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.epistemic, total - expected, rtol=1e-8, atol=1e-15)
    assert found.epistemic.shape == (6, 2)


def test_counts_obey_the_law_of_total_variance():
    la, x = family("poisson", 2, torch.poisson(torch.ones(6, 2)).double())
    found = la.predict(x, n_samples=20000, generator=generator())
    mean, v = found.output_mean, found.output_covariance.diagonal(dim1=1, dim2=2)
    rate = torch.exp(mean + v / 2)
    torch.testing.assert_close(found.mean, rate, rtol=1e-12, atol=0)
    z = (found.aleatoric - rate) / (found.samples.std(0) / 20000**0.5)
    assert z.abs().max() < 4
    squares = (found.samples - rate).square()
    z = (found.epistemic - torch.expm1(v) * rate.square()) / (squares.std(0) / 20000**0.5)
    assert z.abs().max() < 4
    assert found.covariance.shape == (6, 2, 2)


@pytest.mark.parametrize("pred_type", KINDS)
@pytest.mark.parametrize("shift", [0.0, 6.0])
def test_counts_have_the_entropies_of_sums_over_them(pred_type, shift):
    """Rates near one and 400; the sum goes on to where any probability is zero in float64."""
    la, x = family("poisson", 2, torch.randint(4, (6, 2)).double())
    with torch.no_grad():
        la.model[-1].bias.add_(shift)
    la.fit([(x, torch.randint(4, (6, 2)).double())])
    la.prior_precision = 100.0
    found = la.predict(x, pred_type, n_samples=30, generator=generator())
    rates = found.samples
    every = torch.arange(int(3 * rates.max()) + 400).double()
    p = Poisson(rates[..., None], validate_args=False).log_prob(every).exp()
    total, expected = torch.special.entr(p.mean(0)).sum(-1), torch.special.entr(p).sum(-1).mean(0)
    torch.testing.assert_close(found.entropy, total, rtol=1e-10, atol=0)
    gap = found.mutual_information - (total - expected)
    assert float((gap.abs() / total).max()) < 1e-10
    assert bool((found.mutual_information >= 0).all()) and found.entropy.shape == (6, 2)
    assert torch.equal(found.epistemic, found.variance)


def test_counts_with_one_rate_have_its_entropy_and_teach_nothing():
    """``lambda (1 - log lambda) + exp(-lambda) sum lambda^k log k! / k!``."""
    likelihood = likelihoods.Poisson()
    for rate in (1e-3, 0.7, 5.0):
        terms = torch.tensor(rate, dtype=torch.float64).log().expand(7, 1, 1)
        of_mean, mean_of = counts.entropies(likelihood, terms)
        series = sum(rate**k * math.lgamma(k + 1) / math.factorial(k) for k in range(100))
        expected = rate * (1 - math.log(rate)) + math.exp(-rate) * series
        assert float(of_mean) == pytest.approx(expected, rel=1e-12)
        assert float(mean_of) == pytest.approx(expected, rel=1e-12)
    small = torch.tensor([1e-13, 2e-13, 6e-13], dtype=torch.float64)
    of_mean, mean_of = counts.entropies(likelihood, small.log()[:, None, None])
    assert float(of_mean) == pytest.approx(3e-13 * (1 - math.log(3e-13)), rel=1e-11, abs=0)
    assert float(mean_of) == pytest.approx(float((small * (1 - small.log())).mean()), rel=1e-11, abs=0)
    large = counts.entropies(likelihood, torch.tensor(1e5).double().log().expand(2, 1, 1))[0]
    # Log-probabilities are differences of numbers of the size of a million, whose rounding is what is left.
    assert float(large) == pytest.approx(math.log(2 * math.pi * math.e * 1e5) / 2 - 1 / 12e5, rel=1e-9)
    with pytest.raises(UnsupportedError, match="entropy sums over at most 1048576 counts"):
        counts.entropies(likelihood, torch.full((2, 1, 1), 20.0).double())


def test_counts_are_summed_the_same_some_at_a_time(monkeypatch):
    terms = torch.randn(5, 6, 1, generator=generator()).double() * 2
    whole = counts.entropies(likelihoods.Poisson(), terms)
    monkeypatch.setattr(counts, "SUMMED", 5 * 6 * 7)
    torch.testing.assert_close(counts.entropies(likelihoods.Poisson(), terms), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("pred_type", KINDS)
def test_predicted_noise_is_the_aleatoric_part(pred_type):
    la, x = family("heteroscedastic", 4, torch.randn(6, 2).double())
    la.prior_precision = 30.0
    found = la.predict(x, pred_type, n_samples=50, generator=generator())
    options = {"pred_type": pred_type, "n_samples": 50, "diagonal_output": True}
    mean, without = la(x, generator=generator(), **options)
    _, with_noise = la(x, generator=generator(), observation_noise=True, **options)
    torch.testing.assert_close(found.mean, mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.epistemic, without, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.aleatoric, with_noise - without, rtol=1e-9, atol=1e-12)
    with pytest.raises(UnsupportedError, match="entropy is not supported for heteroscedastic"):
        _ = found.entropy


def test_preferences_have_the_entropies_of_the_choice():
    la, x = family("reward_modeling", 2, torch.randint(2, (6,)))
    found = la.predict(x, n_samples=40, generator=generator())
    p = torch.sigmoid(found.outputs[..., 0] - found.outputs[..., 1])
    torch.testing.assert_close(found.entropy, Bernoulli(p.mean(0)).entropy(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.aleatoric, Bernoulli(p).entropy().mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close((found.mean, found.covariance), la(x), rtol=1e-12, atol=0)
    with pytest.raises(
        UnsupportedError, match="probabilities needs a likelihood of classes, found reward_mo"
    ):
        _ = found.probabilities


def test_tokens_have_uncertainties_of_their_own():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4).double(), torch.randn(5, 2, 3).double(), torch.randint(4, (5, 2))
    la = Laplace(model, "classification", "all", "full").fit([(x, y)])
    for kind in KINDS:
        found = la.predict(x, kind, n_samples=20, generator=generator())
        assert found.mean.shape == found.variance.shape == (5, 2, 4)
        torch.testing.assert_close(
            found.entropy, Categorical(found.samples.mean(0)).entropy(), rtol=1e-9, atol=0
        )
        assert found.aleatoric.shape == found.epistemic.shape == (5, 2)


def test_what_a_family_does_not_say_is_refused():
    p = problem("mlp", "regression")
    with pytest.raises(
        UnsupportedError, match="probabilities needs a likelihood of classes, found regression; use"
    ):
        _ = fitted(p).predict(p.x_test).probabilities
    custom = Custom(lambda f, y: -(f - y).square(), event_ndim=0, link=lambda f: 2 * f)
    found = Laplace(p.model, custom, "all", "full").fit(p.batches()).predict(p.x_test, link_approx="mc")
    with pytest.raises(UnsupportedError, match="aleatoric uncertainty is not supported for custom"):
        _ = found.aleatoric
    assert found.epistemic.shape == (5, 3)
    with pytest.raises(NotFittedError):
        Laplace(p.model, "regression").predict(p.x_test)
    with pytest.raises(ValueError, match="n_samples must be at least 2"):
        fitted(p).predict(p.x_test, n_samples=1)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "gp"])
def test_functional_covariances_take_factored_and_dense_jacobians(structure):
    from curvlin_nn.feature_maps import JacobianMap

    p = problem("cnn", "regression")
    la = fitted(p, structure)
    _, Phi = JacobianMap(p.model)(p.x_test)
    for Js in (Phi, Phi.to_dense()):
        torch.testing.assert_close(la.functional_variance(Js), la(p.x_test)[1], rtol=1e-9, atol=1e-12)
        joint = la(p.x_test, joint=True)[1]
        torch.testing.assert_close(la.functional_covariance(Js), joint, rtol=1e-9, atol=1e-12)
    with pytest.raises(TypeError, match="Js must be"):
        la.functional_variance([1.0])
    with pytest.raises(ValueError, match="must have"):
        la.functional_covariance(Phi.to_dense()[..., 1:])
