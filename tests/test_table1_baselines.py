"""`benchmarks/table1`: the baselines that are trained, MFVI and SNGP, against closed forms and dense matrices."""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.func import functional_call, jacrev

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))
from table1 import mfvi, sngp, training  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def z_scores(samples, expected):
    """Of the mean of independent samples along the first dimension."""
    return (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))


def classes(n=60, image=False, seed=0):
    """Points of three classes around different places, or images that are brighter in different rows."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    if not image:
        return torch.eye(3, 4)[y] + 0.4 * torch.randn(n, 4, generator=generator), y
    x = 0.3 * torch.randn(n, 1, 6, 6, generator=generator)
    x[torch.arange(n), 0, 2 * y] += 1
    return x, y


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 3)))


def trunk():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(),
        )  # fmt: skip
        for p in layers.parameters():
            p.data.mul_(3)
        return layers


def flipout(layer, generator):
    found = mfvi.Flipout(layer.double(), generator)
    for p in found.log_std.parameters():
        p.data.uniform_(-1, 0.5, generator=generator)
    return found


class TestFlipout:
    @pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.Conv2d(2, 2, 2, padding=(0, 1))])
    def test_moments_are_those_of_weights_drawn_for_every_example(self, make):
        generator = torch.Generator().manual_seed(0)
        layer = flipout(make(), generator)
        x = torch.randn(
            (2, 3) if isinstance(layer.mean, nn.Linear) else (2, 2, 2, 1), generator=generator
        ).double()
        with torch.no_grad():
            found = torch.stack([layer(x) for _ in range(4000)]).flatten(1)

        def outputs(weights):
            return functional_call(layer.mean, weights, x).flatten(1)

        weights = {k: v.detach() for k, v in layer.mean.named_parameters()}
        variances = {k: (2 * v).exp().detach() for k, v in layer.log_std.named_parameters()}
        jacobian = jacrev(outputs)(weights)
        covariance = sum(
            (J.flatten(2) * variances[name].flatten()) @ J.flatten(2).mT for name, J in jacobian.items()
        )
        error = found - outputs(weights).flatten()
        assert z_scores(error, 0).abs().max() < 4
        products = error[:, :, None] * error[:, None, :]
        assert isinstance(layer.mean, nn.Linear) or covariance[0, 0, 1].abs() > 0.1  # places share weights
        assert z_scores(products, torch.block_diag(*covariance)).abs().max() < 4

    def test_divergence_and_its_gradient_are_the_closed_form(self):
        layer = flipout(nn.Linear(3, 2), torch.Generator().manual_seed(0))
        found = layer.kl(prior_precision=1.7)
        expected = sum(
            torch.distributions.kl_divergence(
                torch.distributions.Normal(mean, log_std.exp()),
                torch.distributions.Normal(torch.zeros_like(mean), 1.7**-0.5),
            ).sum()
            for mean, log_std in zip(layer.mean.parameters(), layer.log_std.parameters(), strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        found.backward()
        for mean, log_std in zip(layer.mean.parameters(), layer.log_std.parameters(), strict=True):
            torch.testing.assert_close(mean.grad, 1.7 * mean.detach(), rtol=1e-12, atol=0)
            expected = 1.7 * (2 * log_std.detach()).exp() - 1
            torch.testing.assert_close(log_std.grad, expected, rtol=1e-12, atol=1e-14)

    def test_draws_have_the_moments_of_the_distribution(self):
        layer = flipout(nn.Linear(2, 2), torch.Generator().manual_seed(0))
        found = torch.stack([layer.draws()["weight"] for _ in range(4000)])
        error = found - layer.mean.weight.detach()
        assert z_scores(error, 0).abs().max() < 4
        assert z_scores(error.square(), (2 * layer.log_std.weight.detach()).exp()).abs().max() < 4


class TestMFVI:
    def test_finds_the_largest_evidence_lower_bound(self):
        """Two classes, one input that is 1: the bound is an integral over one normal variable."""
        n, prior_precision = 12, 0.5
        y = (torch.arange(n) % 4 == 0).long()
        ones = torch.ones(n, 1, dtype=torch.float64)
        model = nn.Linear(1, 2, bias=False).double()
        found = mfvi.fit(
            model, ones, y, seed=0, n_samples=4000, prior_precision=prior_precision, n_steps=1000, batch_size=n,
            lr_mean=0.05, lr_log_std=0.05,
        )  # fmt: skip
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)

        def negative_bound(parameters):
            mean, log_std = parameters[:2], parameters[2:]
            difference = mean[1] - mean[0] + np.sqrt(np.exp(2 * log_std).sum()) * nodes
            losses = np.logaddexp(0, difference) - y.double().mean().item() * difference
            kl = (prior_precision * (mean**2 + np.exp(2 * log_std)) - 2 * log_std).sum() / 2
            return n * losses @ weights / weights.sum() + kl

        best = minimize(negative_bound, np.zeros(4), options={"gtol": 1e-9}).x
        logits = found(ones[:1])[:, 0]
        std = torch.from_numpy(np.exp(best[2:]))
        assert ((logits.mean(0) - torch.from_numpy(best[:2])) / std).abs().max() < 0.1
        torch.testing.assert_close(logits.std(0), std, rtol=0.06, atol=0)

    def test_leaves_the_network_and_the_global_generator_as_they_are(self):
        model, (x, y) = network().train(), classes()
        model[0].weight.requires_grad_(False)
        before, state = copy.deepcopy(model), torch.get_rng_state()
        found = mfvi.fit(model, x, y, seed=0, n_steps=50, lr_mean=0.1, n_samples=3)
        assert not torch.equal(found(x), model(x).expand(3, -1, -1))
        assert torch.equal(torch.get_rng_state(), state)
        for ours, theirs in zip(model.named_parameters(), before.named_parameters(), strict=True):
            assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
            assert ours[1].requires_grad == theirs[1].requires_grad and ours[1].grad is None
        assert model.training
        assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]

    def test_draws_are_decided_by_the_seed_and_the_same_in_every_call(self):
        x, y = classes()
        found, again = (mfvi.fit(network(), x, y, seed=3, n_steps=20, n_samples=4) for _ in range(2))
        assert torch.equal(found(x), again(x))
        torch.testing.assert_close(torch.cat([found(x[:7]), found(x[7:])], 1), found(x, batch_size=13))
        assert not torch.equal(found(x), mfvi.fit(network(), x, y, seed=4, n_steps=20, n_samples=4)(x))

    def test_keeps_the_best_on_held_out_data(self):
        """Steps that are too long make it worse and worse."""
        model, (x, y) = network(), classes()
        settings = {"seed": 0, "n_steps": 200, "lr_mean": 1.0}
        last = mfvi.fit(model, x, y, **settings)
        kept = mfvi.fit(model, x, y, x_val=x, y_val=(y + 1) % 3, **settings)

        def nll(predict):
            return -predict(x).softmax(-1).mean(0)[torch.arange(len(y)), (y + 1) % 3].log().mean()

        assert nll(kept) < nll(last)

    def test_counts_the_distribution_that_it_starts_from(self):
        """No step is better than the first, and SGD at rates of nearly nothing stays there."""
        model, (x, y) = network(), classes()
        at_start = mfvi.fit(model, x, y, seed=0, n_steps=1, lr_mean=1e-12, lr_log_std=1e-12, momentum=0.9)
        kept = mfvi.fit(model, x, y, x_val=x, y_val=model(x).argmax(-1), seed=0, n_steps=50, lr_mean=1.0)
        torch.testing.assert_close(kept(x).mean(0), at_start(x).mean(0), rtol=0, atol=0.05)
        assert not torch.allclose(
            mfvi.fit(model, x, y, seed=0, n_steps=50, lr_mean=1.0)(x), kept(x), atol=0.5
        )

    def test_keeps_the_last_without_held_out_data(self):
        x, y = classes()
        settings = {"seed": 0, "n_steps": 30, "n_samples": 2}
        found = mfvi.fit(network(), x, y, x_val=x[:0], y_val=y[:0], **settings)
        assert torch.equal(found(x), mfvi.fit(network(), x, y, **settings)(x))

    def test_refuses_other_layers(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        with pytest.raises(ValueError, match="BatchNorm1d has parameters"):
            mfvi.fit(model, *classes(), seed=0)


def operator(layer, x):
    """The dense matrix of a layer without its bias."""

    def linear(v):
        return (layer(v.reshape(x.shape)) - layer(torch.zeros_like(x))).flatten()

    return jacrev(linear)(x.flatten())


class TestSpectralNorm:
    def test_every_hidden_layer_obeys_the_bound_after_training(self):
        x, y = classes(image=True)
        found = sngp.fit(
            x.double(), y, seed=0, trunk=trunk().double(), n_classes=3, n_features=16, bound=0.9, n_epochs=3
        )
        inputs, norms = x[:1].double(), []
        for layer in found.features[0]:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                norms.append(torch.linalg.matrix_norm(operator(layer, inputs), 2))
            inputs = layer(inputs)
        assert len(norms) == 3
        assert max(norms) <= 0.9 * (1 + 1e-8)
        assert max(norms) > 0.9 * (1 - 1e-8)

    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Linear(5, 4), torch.zeros(1, 5)),
            (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.zeros(1, 4, 7, 6)),
        ],
    )
    @pytest.mark.parametrize("share", [0.5, 2.0])
    def test_scales_by_the_operator_norm_only_above_the_bound(self, layer, x, share):
        layer, x = copy.deepcopy(layer).double(), x.double()
        weight = layer.weight.detach().clone()
        norm = torch.linalg.matrix_norm(operator(layer, x), 2).item()
        sequence = nn.Sequential(layer)
        sngp.bound_norms(sequence, x, share * norm, torch.Generator().manual_seed(0))
        sngp.settle_norms(sequence)
        torch.testing.assert_close(layer.weight.detach(), min(1, share) * weight, rtol=1e-8, atol=0)

    def test_gradient_is_that_of_the_bounded_weight(self):
        layer, x = nn.Conv2d(2, 3, 3, padding=1).double(), torch.zeros(1, 2, 4, 4).double()
        parametrisation = sngp.BoundedNorm(layer, x, 0.3, torch.Generator().manual_seed(0)).eval()
        weight = layer.weight.detach().clone().requires_grad_()
        parametrisation.converge(weight.detach())

        def bounded(weight):
            fresh = functional_call(layer, {"weight": weight, "bias": torch.zeros(3).double()}, (eye,))
            return weight * 0.3 / torch.linalg.matrix_norm(fresh.flatten(1), 2)

        eye = torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, 4)
        found = torch.autograd.grad(parametrisation(weight).pow(3).sum(), weight)
        expected = torch.autograd.grad(bounded(weight).pow(3).sum(), weight)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def fitted():
    x = classes(image=True)[0].double()
    settings = {"trunk": trunk().double(), "n_classes": 3, "n_features": 16, "n_epochs": 2}
    return sngp.fit(x, classes()[1], seed=0, prior_precision=0.7, **settings), x


class TestSNGP:
    def test_inner_products_of_fourier_features_approximate_the_kernel(self):
        generator = torch.Generator().manual_seed(0)
        features = sngp.FourierFeatures(3, 40_000, generator)
        h = torch.randn(5, 3, generator=generator)
        phi = features(h)
        kernel = (-torch.cdist(h, h).square() / 2).exp()
        samples = len(features.phase) * (phi[:, None] * phi[None]).permute(2, 0, 1)
        assert z_scores(samples, kernel).abs().max() < 4

    def test_precision_is_the_sum_over_training_data(self, fitted):
        found, x = fitted
        expected = 0.7 * torch.eye(16).double()
        for phi in found.features(x):
            expected += torch.outer(phi, phi)
        torch.testing.assert_close(found.precision, expected, rtol=1e-10, atol=1e-12)

    def test_covariance_is_that_of_the_output_weights(self, fitted):
        found, x = fitted
        mean, covariance = found(3 * x + 1)
        phi = found.features(3 * x + 1)
        torch.testing.assert_close(mean, phi @ found.weights.mT, rtol=1e-12, atol=1e-12)
        variances = (phi * torch.linalg.solve(found.precision, phi.mT).mT).sum(-1)
        expected = torch.stack([variance * torch.eye(3).double() for variance in variances])
        torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("mode", [True, False])
    def test_predictions_change_nothing(self, fitted, mode):
        found, x = fitted
        first, precision = found(x), found.precision.clone()
        kept = copy.deepcopy(found.features.state_dict())
        found.features.train(mode)
        found(100 * x)
        assert torch.equal(found.precision, precision)
        assert all(torch.equal(value, kept[name]) for name, value in found.features.state_dict().items())
        assert all(torch.equal(*pair) for pair in zip(found(x), first, strict=True))

    def test_is_decided_by_the_seed_and_leaves_the_rest_alone(self):
        x, y = classes(image=True)
        given = trunk()
        before, state = copy.deepcopy(given.state_dict()), torch.get_rng_state()
        settings = {"trunk": given, "n_classes": 3, "n_features": 8, "n_epochs": 1}
        found, again, other = (sngp.fit(x, y, seed=seed, **settings)(x)[1] for seed in (0, 0, 1))
        assert torch.equal(found, again) and not torch.equal(found, other)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())

    def test_held_out_data_choose_the_prior_precision(self):
        x, y = classes(image=True)
        settings = {"seed": 0, "trunk": trunk(), "n_classes": 3, "n_features": 16, "n_epochs": 1}
        found = sngp.fit(x, y, x_val=x, y_val=y, **settings)
        assert torch.equal(
            sngp.fit(x, y, x_val=x[:0], y_val=y[:0], **settings).precision,
            sngp.fit(x, y, **settings).precision,
        )
        unit = sngp.fit(x, y, **settings, prior_precision=1.0).precision
        chosen = (found.precision - unit).diagonal() + 1
        assert chosen.std() < 1e-9 and chosen.mean() > 100  # draws can only hurt where the mean is right


class TestBudget:
    def test_every_epoch_takes_every_example_once(self):
        steps = list(training.minibatches(10, 4, 6, math.inf, torch.Generator().manual_seed(0)))
        assert [spent for spent, _ in steps] == pytest.approx([i / 6 for i in range(6)])
        epochs = [torch.cat([i for _, i in steps[k : k + 3]]) for k in (0, 3)]
        assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
        assert not torch.equal(*epochs)

    def test_stops_when_the_time_is_up(self):
        x, y = classes()
        model = network()
        found = mfvi.fit(model, x, y, seed=0, seconds=1e-9, n_samples=2)
        torch.testing.assert_close(found(x), model(x).detach().expand(2, -1, -1), rtol=0.1, atol=0.05)
        assert not list(training.minibatches(10, 4, 6, 1e-9, torch.Generator()))
