"""``pred_type="nn"``: the network itself at draws of its weights."""

import pytest
import torch
from networks import Problem, assert_same, problem, state
from torch import Tensor, nn

from curvlin_nn import Laplace, predictive
from curvlin_nn.errors import OutputError, StochasticModelError, UnsupportedError
from curvlin_nn.predictive.running import RunningMoments


def fitted(p: Problem, structure: str = "kron", **options) -> Laplace:
    options.setdefault("subset_of_weights", "all")
    return Laplace(p.model, p.likelihood, hessian_structure=structure, prior_precision=3.0, **options).fit(
        p.batches()
    )


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(la: Laplace, x: Tensor, n: int) -> Tensor:
    """The network at the posterior's draws, by a loop."""
    draws = la.sample(n, generator())
    run = torch.func.functional_call
    return torch.stack([run(la.model, la.parameters.unflatten(theta), (x,)) for theta in draws]).detach()


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "gp"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_samples_are_the_network_at_posterior_samples(kind, structure):
    p = problem(kind, "regression")
    la = fitted(p, structure)
    found = la.functional_samples(p.x_test, 6, generator(), pred_type="nn")
    torch.testing.assert_close(found, one_by_one(la, p.x_test, 6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [None, 1, 700])
def test_moments_are_those_of_the_draws_whatever_the_parts(budget, monkeypatch):
    p = problem("mlp", "regression")
    la = fitted(p, sigma_noise=0.3)
    if budget is not None:
        monkeypatch.setattr(predictive.weight_space, "ACTIVATION_BUDGET", budget)
    draws = one_by_one(la, p.x_test, 40)
    covariance = torch.stack([torch.cov(draws[:, n].T) for n in range(5)])
    variance = covariance.diagonal(dim1=1, dim2=2)
    joint = torch.cov(draws.flatten(1).T)
    eye = 0.09 * torch.eye(15).double()
    for options, mean, spread in [
        ({}, draws.mean(0), covariance),
        ({"diagonal_output": True}, draws.mean(0), variance),
        ({"joint": True}, draws.mean(0).flatten(), joint),
        ({"observation_noise": True}, draws.mean(0), covariance + eye[:3, :3]),
        ({"observation_noise": True, "diagonal_output": True}, draws.mean(0), variance + 0.09),
        ({"observation_noise": True, "joint": True}, draws.mean(0).flatten(), joint + eye),
    ]:
        found = la(p.x_test, "nn", n_samples=40, generator=generator(), **options)
        torch.testing.assert_close(found, (mean, spread), rtol=1e-10, atol=1e-12)


def test_moments_add_up_over_parts_of_any_size():
    draws = torch.randn(50, 4, 3).double() * 1e3 + 1e5
    for diagonal in (False, True):
        moments = RunningMoments(diagonal=diagonal)
        for part in draws.split([1, 30, 17, 2]):
            moments.add(part)
        covariance = torch.stack([torch.cov(draws[:, n].T) for n in range(4)])
        expected = covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance
        torch.testing.assert_close(moments.spread(), expected, rtol=1e-11, atol=0)
        torch.testing.assert_close(moments.mean, draws.mean(0), rtol=1e-13, atol=0)


def test_draws_in_parts_have_the_same_moments_as_their_samples(monkeypatch):
    p = problem("mlp", "regression")
    la = fitted(p)
    monkeypatch.setattr(predictive.draws, "DRAW_BUDGET", 3 * la.n_params)
    draws = la.functional_samples(p.x_test, 8, generator(), pred_type="nn")
    assert len(draws.unique(dim=0)) == 8
    mean, variance = la(p.x_test, "nn", n_samples=8, generator=generator(), diagonal_output=True)
    torch.testing.assert_close((mean, variance), (draws.mean(0), draws.var(0)), rtol=1e-10, atol=1e-13)


def test_probabilities_are_means_over_the_draws():
    p = problem("mlp", "classification")
    la = fitted(p)
    expected = torch.softmax(one_by_one(la, p.x_test, 20), -1)
    for link in ("probit", "mc"):  # the default, and its name
        found = la(p.x_test, "nn", link, n_samples=20, generator=generator())
        torch.testing.assert_close(found, expected.mean(0), rtol=1e-11, atol=0)
    samples = la.predictive_samples(p.x_test, 20, generator(), pred_type="nn")
    torch.testing.assert_close(samples, expected, rtol=1e-11, atol=0)


def test_a_network_linear_in_its_weights_is_its_own_linearisation():
    p = problem("cnn", "regression")
    la = fitted(p, "full", subset_of_weights="last_layer")
    pair = [la.functional_samples(p.x_test, 30, generator(), pred_type=kind) for kind in ("glm", "nn")]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-11)


class Branching(nn.Module):
    """Looks at its weights, which `torch.vmap` does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = self.body.weight  # would be that of the first draw in all others
        if float(self.body.weight.detach().max()) > 1e6:
            return self.head(self.body(x) * 0)
        return self.head(torch.tanh(nn.functional.linear(x, self.seen, self.body.bias)))


def test_what_cannot_be_mapped_runs_draw_by_draw_with_the_same_numbers():
    torch.manual_seed(0)
    p = Problem(Branching().double(), "regression", *(torch.randn(8, n).double() for n in (4, 3, 4)))
    plain = nn.Sequential(p.model.body, nn.Tanh(), p.model.head)
    la = fitted(p, "full")
    before = state(p.model)
    found = la.functional_samples(p.x_test, 7, generator(), pred_type="nn")
    assert_same(before, state(p.model))
    expected = Laplace(plain, "regression", "all", "full", prior_precision=3.0).fit(p.batches())
    torch.testing.assert_close(
        found, expected.functional_samples(p.x_test, 7, generator(), pred_type="nn"), rtol=1e-12, atol=1e-12
    )


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise KeyError("broken")
        return self.head(nn.functional.dropout(self.norm(self.body(x)).relu(), 0.5, self.training))


def test_the_model_comes_back_as_it_was_also_after_an_error():
    p = Problem(WithDropout().double(), "regression", *(torch.randn(8, n).double() for n in (4, 3, 4)))
    p.model.train()
    la = fitted(p)
    for parameter in p.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state(p.model)
    first = la(p.x_test, "nn", n_samples=4, generator=generator())
    second = la(p.x_test, "nn", n_samples=4, generator=generator())
    assert_same(before, state(p.model))
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # in evaluation mode: no dropout
    p.model.broken = True
    before = state(p.model)
    with pytest.raises(KeyError, match="broken"):
        la(p.x_test, "nn", n_samples=4, generator=generator())
    assert_same(before, state(p.model))


class Noisy(nn.Linear):
    noise = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.noise * torch.randn_like(y) if self.noise else y


def test_a_model_that_draws_or_overflows_is_refused():
    p = Problem(Noisy(4, 3).double(), "regression", *(torch.randn(8, n).double() for n in (4, 3, 4)))
    la = fitted(p)
    la.prior_precision = 1e-300
    la.temperature = 1e300
    with pytest.raises(OutputError, match="on a draw of the weights must be finite"):
        la(p.x_test * 1e200, "nn", n_samples=4)
    p.model.noise = 1.0
    with pytest.raises(StochasticModelError, match="drew random numbers on the input"):
        la(p.x_test, "nn", n_samples=4)


def test_requests_that_draws_do_not_serve_are_refused():
    p = problem("mlp", "classification")
    la = fitted(p)
    for link in ("bridge", "mean_field"):
        with pytest.raises(
            UnsupportedError, match=f"link_approx='{link}' is not supported with pred_type='nn'"
        ):
            la(p.x_test, "nn", link)
    p = problem("mlp", "regression")
    with pytest.raises(ValueError, match="n_samples must be at least 2 for a covariance, found 1"):
        fitted(p)(p.x_test, "nn", n_samples=1)


def test_outputs_without_an_axis_of_their_own():
    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(-1)

    p = Problem(Flat(4, 1).double(), "regression", *(torch.randn(8, *n).double() for n in ((4,), (), (4,))))
    la = fitted(p, "full")
    for kind in ("glm", "nn"):
        mean, covariance = la(p.x_test, kind, n_samples=5)
        assert mean.shape == (8, 1) and covariance.shape == (8, 1, 1)
    pair = [la.functional_samples(p.x_test[:1], 9, generator(), pred_type=kind) for kind in ("glm", "nn")]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_unknown_noise_is_the_mean_over_the_draws(pred_type):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    la = Laplace(model, "heteroscedastic", "last_layer", "full", prior_precision=8.0).fit([(x, y)])
    noise = [
        la(x, pred_type, n_samples=4000, generator=generator(), observation_noise=n)[1] for n in (True, False)
    ]
    f = la.functional_samples(x, 4000, generator(), pred_type=pred_type)
    draws = torch.exp(-f[..., 2:])
    z = ((noise[0] - noise[1]).diagonal(dim1=1, dim2=2) - draws.mean(0)) / (draws.std(0) / 4000**0.5)
    assert z.abs().max() < (1e-6 if pred_type == "nn" else 4)
