"""Online Laplace: fixed points in closed form, stated prior precisions, every likelihood, and refusals."""

import network_oracle as oracle
import pytest
import torch
from networks import state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlin_nn import Laplace, marglik_training
from curvlin_nn.errors import DataError, UnsupportedError


class NewtonOnQuadratic(torch.optim.Optimizer):
    """One exact step for a loss that is quadratic in one weight matrix of a linear model; knows nothing of priors."""

    def __init__(self, params, curvature):
        super().__init__(params, {})
        self._inverse = torch.linalg.inv(curvature)

    def step(self):
        ((weight,),) = (group["params"] for group in self.param_groups)
        with torch.no_grad():
            weight -= (self._inverse @ weight.grad.T).T


def linear_data(n=30, inputs=3, outputs=4):
    torch.manual_seed(0)
    x = torch.randn(n, inputs).double()
    return x, x @ torch.randn(inputs, outputs).double() + 0.3 * torch.randn(n, outputs).double()


def linear(outputs=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, outputs, bias=False)).double()


@pytest.mark.parametrize("sigma", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_prior_precision_is_the_stated_one_for_any_number_of_outputs(sigma, temperature):
    """Trained without updates, a linear model is ridge regression; laplace-torch has C times the precision here."""
    (x, y), delta = linear_data(), 5.0
    penalty = delta * sigma**2 * temperature
    A = x.T @ x + penalty * torch.eye(3).double()
    result = marglik_training(
        linear(),
        [(x, y)],
        "regression",
        optimizer_cls=NewtonOnQuadratic,
        optimizer_kwargs={"curvature": A / len(x)},
        n_epochs=2,
        n_epochs_burnin=2,
        prior_prec_init=delta,
        sigma_noise_init=sigma,
        temperature=temperature,
        prior_structure="scalar",
    )
    torch.testing.assert_close(
        result.la.mean.view(4, 3), torch.linalg.solve(A, x.T @ y).T, rtol=1e-10, atol=1e-12
    )
    assert result.margliks == []
    assert float(result.la.prior_precision) == delta
    f = x @ result.la.mean.view(4, 3).T
    log_p = torch.distributions.Normal(f, sigma).log_prob(y).sum() / temperature
    scatter = delta * result.la.mean.square().sum() / 2
    assert result.losses[-1] == pytest.approx(float(scatter - log_p) / len(x), rel=1e-10)


class LongSteps(torch.optim.SGD):
    """Newton's steps, but for the prior, where inputs are white."""

    def __init__(self, params):
        super().__init__(params, lr=1.0)


@pytest.mark.parametrize(
    ("structure", "prior_structure"), [("full", "scalar"), ("kron", "layerwise"), ("diag", "scalar")]
)
def test_a_linear_model_ends_at_the_fixed_point(structure, prior_structure):
    """The parameters are the mode of the prior, which has the largest evidence at these parameters."""
    x, y = linear_data(outputs=1)
    x = torch.linalg.qr(x - x.mean(0)).Q * 30**0.5
    model = nn.Sequential(nn.Linear(3, 1)).double()
    result = marglik_training(
        model,
        [(x, y)],
        "regression",
        structure,
        optimizer_cls=LongSteps,
        n_epochs=25,
        lr_hyp=0.5,
        prior_structure=prior_structure,
    )
    design = torch.cat([x, torch.ones(30, 1).double()], dim=1)
    la = Laplace(model, "regression", "all", structure, prior_structure=prior_structure)
    precision, sigma = torch.ones(4).double(), 1.0
    for _ in range(25):
        A = design.T @ design / sigma**2 + torch.diag(precision)
        mode = torch.linalg.solve(A, design.T @ y / sigma**2).flatten()
        nn.utils.vector_to_parameters(mode, model.parameters())
        la.fit([(x, y)])
        optimum = la.optimize_prior_precision(prior_structure=prior_structure, optimize_noise=True)
        sigma = float(la.sigma_noise)
        precision = optimum.prior_precision.repeat_interleave(
            torch.tensor([4] if prior_structure == "scalar" else [3, 1])
        )
    assert result.margliks[-1] == pytest.approx(optimum.log_marginal_likelihood, abs=1e-6)
    assert max(result.margliks) == pytest.approx(float(result.la.log_marginal_likelihood()), abs=1e-9)


def data_of(likelihood, n=24):
    torch.manual_seed(0)
    x = torch.randn(n, 2)
    y = {
        "classification": lambda: (x[:, 0] > 0).long() + (x[:, 1] > 0).long(),
        "binary": lambda: (x > 0).float(),
        "regression": lambda: x.sin() + 0.1 * torch.randn(n, 2),
        "poisson": lambda: torch.poisson(x.exp()),
        "heteroscedastic": lambda: x[:, :1].sin() + 0.1 * torch.randn(n, 1),
    }[likelihood]()
    outputs = 3 if likelihood == "classification" else 2
    torch.manual_seed(2)
    return x, y, nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs))


@pytest.mark.parametrize(
    ("likelihood", "structure", "prior_structure"),
    [
        ("classification", "kron", "layerwise"),
        ("classification", "diag", "diag"),
        ("binary", "kron", "scalar"),
        ("regression", "full", "layerwise"),
        ("regression", "kron", "modulewise"),
        ("poisson", "diag", "layerwise"),
        ("heteroscedastic", "full", "scalar"),
        ("heteroscedastic", "full", "diag"),
    ],
)
def test_every_likelihood_learns_its_hyperparameters(likelihood, structure, prior_structure):
    x, y, model = data_of(likelihood)
    loader = DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True)
    la, trained, margliks, losses = marglik_training(
        model,
        loader,
        likelihood,
        structure,
        optimizer_kwargs={"lr": 3e-2},
        prior_structure=prior_structure,
        n_epochs=30,
        n_epochs_burnin=5,
        marglik_frequency=5,
    )
    assert trained is model
    assert len(losses) == 30
    assert len(margliks) == 5
    assert margliks[-1] > margliks[0]
    assert float(la.log_marginal_likelihood()) == pytest.approx(max(margliks), rel=1e-5)
    assert (float(la.sigma_noise) == 1) == (likelihood != "regression")
    groups = {"scalar": 1, "layerwise": 4, "modulewise": 2, "diag": la.n_params}[prior_structure]
    assert la.prior_precision.numel() == groups
    torch.testing.assert_close(la.mean, nn.utils.parameters_to_vector(model.parameters()).detach())


@pytest.mark.parametrize("step", [0.05, 0.5])
def test_steps_are_bounded_and_each_increases_the_evidence(step):
    x, y, model = data_of("regression")
    result = marglik_training(
        model,
        [(x, y)],
        "regression",
        n_epochs=1,
        n_hypersteps=3,
        lr_hyp=step,
        prior_prec_init=1e3,
        optimizer_kwargs={"lr": 0.0},
    )
    la = result.la
    moved = la.prior_precision.log() - torch.tensor(1e3).double().log()
    assert float(moved.abs().max()) <= 3 * step + 1e-12
    assert float((2 * la.sigma_noise.log()).abs()) <= 3 * step + 1e-12
    assert float(moved.abs().max()) > step
    start = Laplace(model, "regression", "all", "kron", prior_precision=1e3).fit([(x, y)])
    assert result.margliks[0] > float(start.log_marginal_likelihood())
    values = [
        marglik_training(
            model,
            [(x, y)],
            "regression",
            n_epochs=1,
            n_hypersteps=k,
            lr_hyp=step,
            prior_prec_init=1e3,
            optimizer_kwargs={"lr": 0.0},
        ).margliks[0]
        for k in (1, 2, 4)
    ]
    assert values == sorted(values)


def test_unused_and_zero_parameters_do_not_stop_training():
    """Neither has a best prior precision: the steps are bounded, and a group without any information stays."""
    x, y, model = data_of("classification")
    with torch.no_grad():
        model[2].bias.zero_()
    frozen = nn.Sequential(nn.Linear(2, 2), *model)
    frozen[0].requires_grad_(False)
    result = marglik_training(frozen, [(x, y)], n_epochs=2, optimizer_kwargs={"lr": 0.0})
    assert torch.isfinite(result.la.prior_precision).all()
    assert float(result.la.prior_precision[3]) > 1  # zero: towards infinity
    assert result.la.parameters.names == ("1.weight", "1.bias", "3.weight", "3.bias")


def test_the_best_parameters_are_kept_with_their_hyperparameters():
    x, y, model = data_of("regression")

    class Spoil(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            super().step(closure)
            self.count += 1
            if self.count == 6:
                with torch.no_grad():
                    for group in self.param_groups:
                        for p in group["params"]:
                            p.mul_(30)

    result = marglik_training(
        model, [(x, y)], "regression", optimizer_cls=Spoil, optimizer_kwargs={"lr": 1e-2}, n_epochs=6
    )
    assert result.margliks[-1] < max(result.margliks) - 10
    assert float(result.la.log_marginal_likelihood()) == pytest.approx(max(result.margliks), rel=1e-6)
    H = oracle.curvature(model.double(), x.double(), y.double(), "regression", "kron")
    sizes = torch.tensor([p.numel() for p in model.parameters()])
    expected = oracle.log_marginal_likelihood(
        model,
        x.double(),
        y.double(),
        "regression",
        H,
        result.la.prior_precision.repeat_interleave(sizes),
        float(result.la.sigma_noise),
    )
    assert max(result.margliks) == pytest.approx(expected, rel=1e-5)


def test_fixed_noise_modes_and_schedulers():
    x, y, model = data_of("regression")
    model.insert(1, nn.Dropout(0.5))
    model[1].eval()
    model.train(True)
    model[0].eval()
    modes = [m.training for m in model.modules()]
    seen = []

    class Scheduler:
        def __init__(self, optimizer, factor):
            self.optimizer, self.factor = optimizer, factor

        def step(self):
            seen.append(model[1].training)
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor

    result = marglik_training(
        model,
        list(zip(x.split(8), y.split(8), strict=True)),
        "regression",
        scheduler_cls=Scheduler,
        scheduler_kwargs={"factor": 0.5},
        n_epochs=2,
        sigma_noise_init=0.7,
        fix_sigma_noise=True,
    )
    assert seen == [True] * 6  # after every batch, in training mode
    assert [m.training for m in model.modules()] == modes
    assert float(result.la.sigma_noise) == 0.7
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"optimizer_kwargs": {"weight_decay": 0.1}},
            UnsupportedError,
            "sets a weight_decay, but the prior is one",
        ),
        ({"prior_structure": "diag"}, UnsupportedError, "cuts through blocks of the curvature"),
        ({"prior_structure": "x"}, UnsupportedError, "prior_structure='x' is not supported"),
        ({"hessian_structure": "x"}, UnsupportedError, "hessian_structure='x' is not supported"),
        ({"lr_hyp": 0.7}, ValueError, "lr_hyp must be above 0 and at most 0.5"),
        ({"n_epochs": 0}, ValueError, "n_epochs must be a positive integer"),
        ({"prior_prec_init": -1.0}, ValueError, "prior_precision must be positive"),
        ({"prior_prec_init": torch.ones(3)}, ValueError, "prior_prec_init must have 1 or 4 entries, found 3"),
        ({"sigma_noise_init": 0.5}, ValueError, "sigma_noise must be 1 for classification"),
        ({"sigma_noise_init": torch.ones(2)}, UnsupportedError, "sigma_noise_init must be one number"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"train_loader": []}, DataError, "yielded no batch"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_trained(options, error, message):
    x, y, model = data_of("classification")
    before = state(model)
    with pytest.raises(error, match=message):
        marglik_training(model, **{"train_loader": [(x, y)], "n_epochs": 2, **options})
    for key, value in state(model).items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key], (
            key
        )


def test_a_loader_that_can_be_gone_through_once_is_refused():
    x, y, model = data_of("classification")
    with pytest.raises(DataError, match="give one to iterate again"):
        marglik_training(model, iter([(x, y)]), n_epochs=2)
