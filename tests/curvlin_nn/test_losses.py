"""Torch's losses as likelihoods: curvature of the sum, whatever the reduction, against autodiff of the loss itself."""

import math

import pytest
import torch
from likelihood_cases import OUTPUT_WEIGHT, POS_WEIGHT, WEIGHT, ignored, network, shares, soft
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from curvlin_nn import Laplace, curvature, likelihoods
from curvlin_nn.errors import UnsupportedError

UNIT = torch.tensor(1.0, dtype=torch.float64)


def class_weights(y: Tensor, index: int = -100) -> float:
    kept = y[y != index]
    return float(WEIGHT[kept].sum())


# A loss with its options, the shape of its outputs, targets, and what the mean is a fraction of.
LOSSES = {
    "labels": (nn.CrossEntropyLoss, {}, (3,), lambda n: torch.randint(3, (n,)), len),
    "class weight": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT},
        (3,),
        lambda n: torch.randint(3, (n,)),
        class_weights,
    ),
    "ignored by default": (nn.CrossEntropyLoss, {}, (3,), ignored(), lambda y: int((y != -100).sum())),
    "class weight, ignored": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "ignore_index": 1},
        (3,),
        ignored(index=1),
        lambda y: class_weights(y, 1),
    ),
    "class weight, smoothing": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.3},
        (3,),
        ignored(),
        class_weights,
    ),
    "pixels": (nn.CrossEntropyLoss, {"weight": WEIGHT}, (3, 2), ignored(2), class_weights),
    "soft": (nn.CrossEntropyLoss, {}, (3,), soft, len),
    "soft, weight": (nn.CrossEntropyLoss, {"weight": WEIGHT, "label_smoothing": 0.1}, (3,), soft, len),
    "soft pixels": (nn.CrossEntropyLoss, {}, (3, 2), shares(3, 2), lambda y: y.numel() // 3),
    "pos_weight": (nn.BCEWithLogitsLoss, {"pos_weight": POS_WEIGHT}, (3,), shares(3), Tensor.numel),
    "output weight": (nn.BCEWithLogitsLoss, {"weight": OUTPUT_WEIGHT}, (2, 3), shares(2, 3), Tensor.numel),
    "squared error": (nn.MSELoss, {}, (3,), shares(3), Tensor.numel),
    "counts": (
        nn.PoissonNLLLoss,
        {"full": True},
        (2,),
        lambda n: torch.randint(6, (n, 2)).double(),
        Tensor.numel,
    ),
}


def setting(name: str, reduction: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor, float]:
    """Model, loss, inputs, targets, and what the reported loss is a fraction of."""
    kind, options, shape, targets, divisor = LOSSES[name]
    torch.manual_seed(1)
    x, y = torch.randn(6, 3).double(), targets(6)
    return (
        network(shape),
        kind(**options, reduction=reduction),
        x,
        y,
        divisor(y) if reduction == "mean" else 1.0,
    )


def hessian_of(loss: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``J^T (d^2 loss / df^2) J`` over the whole batch at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    f = model(x).detach()
    Lambda = hessian(lambda o: loss(o, y).sum())(f).reshape(f.numel(), f.numel())
    blocks = jacrev(lambda p: functional_call(model, p, (x,)).reshape(-1))(parameters)
    J = torch.cat([block.reshape(f.numel(), -1) for block in blocks.values()], dim=1)
    return J.T @ Lambda @ J


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_curvature_is_that_of_the_sum_whatever_the_reduction(name, reduction):
    """Class weights, ignored labels, soft targets, weights of outputs and of positives: none is left out."""
    model, loss, x, y, divisor = setting(name, reduction)
    found = curvature(model, loss, [(x, y)], "full").to_dense()
    expected = divisor * hessian_of(loss, model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_log_likelihood_is_the_negative_sum_normalised(name, reduction):
    model, loss, x, y, divisor = setting(name, reduction)
    family, f = likelihoods.from_loss(loss), model(x).detach()
    y = y.to(f) if isinstance(loss, nn.BCEWithLogitsLoss) else y
    found = family.log_likelihood(family.statistics(f, family.check(f, y, "the data")), UNIT)
    total = divisor * loss(f, y).sum()
    if isinstance(loss, nn.MSELoss):  # the density of variance 1/2
        expected = -total - f.numel() * math.log(math.pi) / 2
    elif isinstance(loss, nn.PoissonNLLLoss):  # torch has Stirling's formula for log y!
        expected = torch.distributions.Poisson(f.exp()).log_prob(y).sum()
    else:
        expected = -total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_sums_over_batches_are_not_means_over_batches():
    """Of unequal weights: what each batch's mean is divided by is undone batch by batch."""
    model, loss, x, y, _ = setting("class weight, ignored", "mean")
    found = curvature(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])], "full").to_dense()
    parts = [class_weights(t, 1) * hessian_of(loss, model, s, t) for s, t in ((x[:4], y[:4]), (x[4:], y[4:]))]
    torch.testing.assert_close(found, sum(parts), rtol=1e-10, atol=1e-13)


def test_squared_error_has_twice_the_curvature_of_regression():
    model, loss, x, y, _ = setting("squared error", "sum")
    twice = curvature(model, loss, [(x, y)], "full").to_dense()
    torch.testing.assert_close(
        twice, 2 * curvature(model, "regression", [(x, y)], "full").to_dense(), rtol=1e-12, atol=1e-15
    )
    la = Laplace(model, loss, "all", "full", sigma_noise=0.5**-0.5).fit([(x, y)])
    unit = Laplace(model, "regression", "all", "full").fit([(x, y)])  # the same posterior: 1/2 sigma^2 = 1
    torch.testing.assert_close(
        la.log_marginal_likelihood(), unit.log_marginal_likelihood(), rtol=1e-12, atol=0
    )


class Focal(nn.CrossEntropyLoss):
    """A loss of another kind, though it inherits."""

    def forward(self, input, target):
        return super().forward(input, target) ** 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            nn.NLLLoss(),
            "the loss NLLLoss is not supported.*leave log_softmax out of the model and use CrossEntropyLoss",
        ),
        (nn.BCELoss(), "the loss BCELoss is not supported.*leave the sigmoid out"),
        (
            nn.GaussianNLLLoss(),
            r"GaussianNLLLoss is not supported.*likelihoods.Gaussian\(variances=.*'heteroscedastic'",
        ),
        (nn.HuberLoss(), "the loss HuberLoss is not supported; expected one of 'CrossEntropyLoss', .*Custom"),
        (Focal(), "the loss Focal is not supported"),
        (nn.PoissonNLLLoss(log_input=False), "log_input=False is not supported; expected log_input=True"),
    ],
)
def test_losses_without_a_likelihood_are_refused_by_name(loss, message):
    for use in (likelihoods.from_loss, likelihoods.resolve, lambda one: Laplace(network((3,)), one)):
        with pytest.raises(UnsupportedError, match=message) as caught:
            use(loss)
        assert "\n" not in str(caught.value)
