"""Families with every weighting, each with the same loss written in torch: the oracle of the likelihoods' tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.func import functional_call, grad, hessian, jacrev

from curvlin_nn.likelihoods import (
    Bernoulli,
    Categorical,
    Custom,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    Preference,
)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A family, and what it is to equal.

    Attributes:
        make: the likelihood.
        shape: of one sample's outputs.
        targets: of N samples.
        loss: the negative log-likelihood of one sample up to a constant.
        curved: of outputs, targets and the same outputs as constants, a function whose Hessian is Lambda, where that
            is not the Hessian of `loss`.
    """

    make: Callable[[], Likelihood]
    shape: tuple[int, ...]
    targets: Callable[[int], Tensor]
    loss: Loss
    curved: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def outputs(self, n: int) -> Tensor:
        return 1.2 * torch.randn(n, *self.shape, dtype=torch.float64)

    def hessians(self, f: Tensor, y: Tensor) -> Tensor:
        """Lambda ``(N, C, C)`` of whole samples, by autodiff."""
        curved = self.curved or (lambda o, t, at: self.loss(o, t))
        size = f[0].numel()
        pairs = zip(f, y, strict=True)
        return torch.stack(
            [hessian(lambda o, t=t, at=at: curved(o, t, at))(at).reshape(size, size) for at, t in pairs]
        )

    def gradients(self, f: Tensor, y: Tensor) -> Tensor:
        """``(N, *T)``."""
        return torch.stack([grad(lambda o, t=t: self.loss(o, t))(o) for o, t in zip(f, y, strict=True)])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


WEIGHT = tensor(0.3, 2.0, 0.7)
POS_WEIGHT, OUTPUT_WEIGHT = tensor(3.0, 0.4, 1.5), tensor(0.6, 1.0, 2.5)
SIGMA = torch.tensor([[1.5, 0.4, 0.0], [0.4, 0.8, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
THRESHOLDS = tensor(-1.0, 0.2, 1.3)
DISPERSION = 2.5


def cross_entropy(class_dim: int = -1, **options) -> Loss:
    """Of one sample; torch wants classes along axis 1."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        if class_dim == -1 and f.ndim > 1:
            f, y = f.movedim(-1, 0), y.movedim(-1, 0) if y.is_floating_point() else y
        return F.cross_entropy(f[None], y[None], reduction="sum", **options)

    return loss


def labels(*places: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(3, (n, *places))


def ignored(*places: int, index: int = -100) -> Callable[[int], Tensor]:
    """Every third label is ignored, the second one first."""

    def targets(n: int) -> Tensor:
        y = torch.randint(3, (n, *places))
        y.view(-1)[1::3] = index
        return y

    return targets


def soft(n: int) -> Tensor:
    """Rows whose sums are not one, and one of zeros."""
    y = torch.rand(n, 3, dtype=torch.float64) * torch.rand(n, 1, dtype=torch.float64)
    y[1] = 0.0
    return y


def bce(weight: Tensor | None = None, pos_weight: Tensor | None = None) -> Loss:
    return lambda f, y: F.binary_cross_entropy_with_logits(
        f, y.to(f), weight=weight, pos_weight=pos_weight, reduction="sum"
    )


def bits(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(2, (n, *shape)).double()


def shares(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.rand(n, *shape, dtype=torch.float64)


def reals(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def normal(f: Tensor) -> Normal:
    """The heteroscedastic family by mean and standard deviation."""
    f_1, f_2 = f.chunk(2, dim=-1)
    return Normal(f_1 * torch.exp(-f_2), torch.exp(-f_2 / 2), validate_args=False)


def negative_binomial(f: Tensor, y: Tensor) -> Tensor:
    """log p with mean ``exp(f)`` and variance ``mu + mu^2 / r``."""
    y, r = y.to(f), DISPERSION
    choose = torch.lgamma(y + r) - torch.lgamma(y + 1) - torch.lgamma(torch.tensor(r, dtype=f.dtype))
    return (
        choose + y * f - (y + r) * torch.log(r + torch.exp(f)) + r * torch.log(torch.tensor(r, dtype=f.dtype))
    )


def ordinal(f: Tensor, y: Tensor) -> Tensor:
    """log p of a cumulative logit model: ``P(y <= k) = sigmoid(threshold_k - f)``."""
    edges = torch.cat([tensor(-torch.inf), THRESHOLDS, tensor(torch.inf)])
    lower, upper = edges[torch.stack([y, y + 1])] - f
    return torch.log(torch.sigmoid(upper) - torch.sigmoid(lower))


def torch_ordinal(f: Tensor, y: Tensor) -> Tensor:
    """The same, from the probabilities of all levels."""
    cumulative = torch.sigmoid(THRESHOLDS - f[..., None])
    ones = torch.ones_like(cumulative[..., :1])
    p = torch.diff(cumulative, dim=-1, prepend=0 * ones, append=ones)
    return -p.gather(-1, y[..., None]).log().sum()


def draw_ordinal(f: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    noise = torch.rand(n, *f.shape, dtype=f.dtype, generator=generator).logit()
    return torch.bucketize(f + noise, THRESHOLDS)


def torch_negative_binomial(f: Tensor, y: Tensor) -> Tensor:
    family = torch.distributions.NegativeBinomial(
        DISPERSION, logits=f - torch.log(tensor(DISPERSION)), validate_args=False
    )
    return -family.log_prob(y).sum()


CASES: dict[str, Case] = {
    "labels": Case(Categorical, (3,), labels(), cross_entropy()),
    "class weight": Case(lambda: Categorical(WEIGHT), (3,), labels(), cross_entropy(weight=WEIGHT)),
    "smoothing": Case(
        lambda: Categorical(label_smoothing=0.2), (3,), labels(), cross_entropy(label_smoothing=0.2)
    ),
    "weight, smoothing": Case(
        lambda: Categorical(WEIGHT, 0.2), (3,), labels(), cross_entropy(weight=WEIGHT, label_smoothing=0.2)
    ),
    "ignored": Case(lambda: Categorical(ignore_index=-100), (3,), ignored(), cross_entropy()),
    "weight, smoothing, ignored": Case(
        lambda: Categorical(WEIGHT, 0.2, ignore_index=2),
        (3,),
        ignored(index=2),
        cross_entropy(weight=WEIGHT, label_smoothing=0.2, ignore_index=2),
    ),
    "soft": Case(Categorical, (3,), soft, cross_entropy()),
    "soft, weight, smoothing": Case(
        lambda: Categorical(WEIGHT, 0.2), (3,), soft, cross_entropy(weight=WEIGHT, label_smoothing=0.2)
    ),
    "tokens": Case(
        lambda: Categorical(WEIGHT, ignore_index=-100), (2, 3), ignored(2), cross_entropy(weight=WEIGHT)
    ),
    "tokens, smoothing": Case(
        lambda: Categorical(label_smoothing=0.3, ignore_index=-100),
        (2, 3),
        ignored(2),
        cross_entropy(label_smoothing=0.3),
    ),
    "pixels": Case(
        lambda: Categorical(WEIGHT, ignore_index=-100, class_dim=1),
        (3, 2),
        ignored(2),
        cross_entropy(1, weight=WEIGHT),
    ),
    "soft pixels": Case(
        lambda: Categorical(WEIGHT, class_dim=1),
        (3, 2),
        shares(3, 2),
        cross_entropy(1, weight=WEIGHT),
    ),
    "bits": Case(Bernoulli, (3,), bits(3), bce()),
    "one bit": Case(Bernoulli, (), bits(), bce()),
    "pos_weight": Case(lambda: Bernoulli(pos_weight=POS_WEIGHT), (3,), bits(3), bce(None, POS_WEIGHT)),
    "soft bits, weight, pos_weight": Case(
        lambda: Bernoulli(OUTPUT_WEIGHT, POS_WEIGHT), (2, 3), shares(2, 3), bce(OUTPUT_WEIGHT, POS_WEIGHT)
    ),
    "regression": Case(Gaussian, (3,), reals(3), lambda f, y: (f - y).square().sum() / 2),
    "variances": Case(
        lambda: Gaussian(variances=WEIGHT),
        (2, 3),
        reals(2, 3),
        lambda f, y: -Normal(f, WEIGHT.sqrt(), validate_args=False).log_prob(y).sum(),
    ),
    "covariance": Case(
        lambda: Gaussian(covariance=SIGMA),
        (3,),
        reals(3),
        lambda f, y: -MultivariateNormal(f, SIGMA, validate_args=False).log_prob(y),
    ),
    "heteroscedastic": Case(
        HeteroscedasticGaussian,
        (4,),
        reals(2),
        lambda f, y: -normal(f).log_prob(y).sum(),
        lambda f, y, at: kl_divergence(normal(at), normal(f)).sum(),
    ),
    "counts": Case(
        Poisson,
        (3,),
        lambda n: torch.randint(6, (n, 3)),
        lambda f, y: F.poisson_nll_loss(f, y.to(f), log_input=True, reduction="sum"),
    ),
    "rewards": Case(
        Preference, (2,), lambda n: torch.randint(2, (n,)), lambda f, y: F.cross_entropy(f[None], y[None])
    ),
    "reward difference": Case(
        Preference,
        (1,),
        lambda n: torch.randint(2, (n,)),
        lambda f, y: F.binary_cross_entropy_with_logits(f, 1 - y[None].to(f)),
    ),
    "negative binomial": Case(
        lambda: Custom(negative_binomial, event_ndim=0),
        (3,),
        lambda n: torch.randint(6, (n, 3)),
        torch_negative_binomial,
    ),
    "ordinal": Case(
        lambda: Custom(ordinal, event_ndim=0, sample=draw_ordinal),
        (2,),
        lambda n: torch.randint(4, (n, 2)),
        torch_ordinal,
    ),
    "custom covariance": Case(
        lambda: Custom(
            lambda f, y: MultivariateNormal(f, SIGMA, validate_args=False).log_prob(y),
            target_ndim=1,
            sample=lambda f, n, g: (
                f + torch.randn(n, *f.shape, dtype=f.dtype, generator=g) @ torch.linalg.cholesky(SIGMA).mT
            ),
        ),
        (2, 3),
        reals(2, 3),
        lambda f, y: -MultivariateNormal(f, SIGMA, validate_args=False).log_prob(y).sum(),
    ),
}


def network(shape: tuple[int, ...], seed: int = 3) -> nn.Module:
    """A small one whose outputs have any shape."""
    torch.manual_seed(seed)
    size = int(torch.Size(shape).numel())
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, size)]
    return nn.Sequential(*layers, nn.Unflatten(1, shape) if shape else nn.Flatten(0)).double()


def ggn(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The dense GGN of the case's loss, summed over samples, by per-sample autodiff."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        f = model(x)
    total = torch.zeros((), dtype=torch.float64)
    for sample, Lambda in zip(x, case.hessians(f, y), strict=True):
        blocks = jacrev(lambda p, s=sample: functional_call(model, p, (s[None],)).reshape(-1))(parameters)
        J = torch.cat([block.reshape(len(Lambda), -1) for block in blocks.values()], dim=1)
        total = total + J.T @ Lambda @ J
    return total


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
