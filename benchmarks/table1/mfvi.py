"""Mean-field variational inference, fine-tuned from the trained network with flipout (arXiv 1803.04386).

A comparison, written here because no library serves it as it is meant (November 2026). `bayesian_torch` 0.5
draws flipout's signs for every pixel instead of every channel, so that two places of an image seem independent, though
they share weights, and averages the divergence over weights instead of summing it. `torch_uncertainty` 0.13 and
`lightning_uq_box` 0.4 need torchvision, and the former has no flipout.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from .training import anneal, channels_last, minibatches

INITIAL_LOG_STD = (-6.0, -5.0)
"""Range of the logarithms of the standard deviations before training, as published."""


class Flipout(nn.Module):
    """A layer whose weights are drawn from independent normal distributions, for every example anew.

    One perturbation of the weights is drawn per call; random signs of inputs and outputs, one per example and channel,
    make it another one for every example: equal in distribution, uncorrelated between examples.

    Args:
        layer: a linear layer or a convolution; its weights and biases are copied and become the means.
        generator: of all draws.

    Attributes:
        mean: the layer with the means in place of weights.
        log_std: the layer with the logarithms of the standard deviations.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
        super().__init__()
        self.mean = copy.deepcopy(layer).requires_grad_()
        self.log_std = copy.deepcopy(layer).requires_grad_()
        self._generator = generator
        for parameter in self.log_std.parameters():
            parameter.data.uniform_(*INITIAL_LOG_STD, generator=generator)

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
        mean = self.mean(x)
        noise = {name: p.exp() * self._normal(p) for name, p in self.log_std.named_parameters()}
        return mean + self._signs(mean) * functional_call(self.log_std, noise, self._signs(x) * x)

    @torch.no_grad()
    def draws(self) -> dict[str, Tensor]:
        """Weights and biases, drawn once."""
        pairs = zip(self.mean.named_parameters(), self.log_std.parameters(), strict=True)
        return {name: mean + log_std.exp() * self._normal(mean) for (name, mean), log_std in pairs}

    def kl(self, prior_precision: float) -> Float[Tensor, ""]:
        """Kullback-Leibler divergence, in nats, from the distribution of the weights to N(0, 1 / `prior_precision`)."""
        total = torch.zeros(())
        for mean, log_std in zip(self.mean.parameters(), self.log_std.parameters(), strict=True):
            second_moment = mean.square() + (2 * log_std).exp()
            total = total + (prior_precision * second_moment - 2 * log_std).sum() / 2
            total = total - mean.numel() * (1 + math.log(prior_precision)) / 2
        return total

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype)

    def _signs(self, like: Tensor) -> Tensor:
        shape = (*like.shape[:2], *(1 for _ in like.shape[2:]))  # the same in all places of an image
        return torch.randint(0, 2, shape, generator=self._generator).mul_(2).sub_(1).to(like)


@dataclass(frozen=True)
class WeightDraws:
    """The network with each of some draws of its weights.

    Attributes:
        model: the network.
        weights: of every draw, by the names of `model`.
    """

    model: nn.Module
    weights: tuple[dict[str, Tensor], ...]

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "N ..."], batch_size: int = 250) -> Float[Tensor, "S N C"]:
        """Logits under every draw; the same draws for all inputs and all calls."""
        parts = [channels_last(part) for part in x.split(batch_size)]
        return torch.stack(
            [torch.cat([functional_call(self.model, w, p) for p in parts]) for w in self.weights]
        )


def fit(
    model: nn.Module,
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    *,
    seed: int,
    seconds: float = math.inf,
    x_val: Float[Tensor, "M ..."] | None = None,
    y_val: Int[Tensor, " M"] | None = None,
    n_samples: int = 20,
    prior_precision: float = 1.0,
    n_steps: int = 8000,
    batch_size: int = 100,
    lr_mean: float = 1e-4,
    lr_log_std: float = 1e-2,
    momentum: float | None = None,
    n_checks: int = 8,
) -> WeightDraws:
    """Maximises the evidence lower bound from the network's weights on.

    The published settings, but for weight decay, since the divergence already holds the prior, and for the optimiser.
    The published one, SGD at 1e-4 and 1e-3, moves log standard deviations by 0.002 in 8,000 steps (their gradient is
    about 1 / N): it reports the distribution that it starts from. Adam gets to the optimum of the bound.

    Args:
        model: trained; left as it is. All its parameters belong to linear layers and convolutions.
        x: training inputs.
        y: their classes.
        seed: of all that is random.
        seconds: CPU time after which to stop.
        x_val: inputs held out, perhaps none. With them the draws of the smallest negative log-likelihood among
            `n_checks` on the way and those before any step are kept, the last ones without.
        y_val: their classes.
        n_samples: draws that predict.
        prior_precision: of every weight and bias, prior mean zero.
        n_steps: after which to stop.
        batch_size: examples per step.
        lr_mean: learning rate of means at first; it falls to zero along a cosine.
        lr_log_std: that of the log standard deviations.
        momentum: of Nesterov's for SGD, as published, in the place of Adam.
        n_checks: on the held-out data, at equal distances, the last one at the end.

    Returns:
        Answers inputs with logits ``(n_samples, N, C)``.

    Raises:
        ValueError: if a parameter belongs to another kind of layer.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    variational = _variational(copy.deepcopy(plain), generator)
    layers = {name: m for name, m in variational.named_modules() if isinstance(m, Flipout)}
    means = [p for layer in layers.values() for p in layer.mean.parameters()]
    log_stds = [p for layer in layers.values() for p in layer.log_std.parameters()]
    groups = [{"params": means, "lr": lr_mean}, {"params": log_stds, "lr": lr_log_std}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(groups)
        if momentum is None
        else torch.optim.SGD(groups, momentum=momentum, nesterov=True)
    )

    def posterior() -> WeightDraws:
        return WeightDraws(plain, tuple(_draw(layers) for _ in range(n_samples)))

    has_held_out = x_val is not None and len(x_val) > 0
    best, smallest, next_check = None, math.inf, 0.0
    for spent, batch in minibatches(len(x), batch_size, n_steps, seconds, generator):
        if has_held_out and spent >= next_check:
            next_check += 1 / n_checks
            candidate = posterior()
            if (nll := _nll(candidate(x_val), y_val)) < smallest:
                best, smallest = candidate, nll
        anneal(optimizer, spent)
        optimizer.zero_grad()
        kl = torch.stack([layer.kl(prior_precision) for layer in layers.values()]).sum()
        (F.cross_entropy(variational(channels_last(x[batch])), y[batch]) + kl / len(x)).backward()
        optimizer.step()

    last = posterior()
    return last if best is None or _nll(last(x_val), y_val) < smallest else best


def _variational(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module with flipout in its layers; its own parts are replaced."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return Flipout(module, generator)
    if next(module.parameters(recurse=False), None) is not None:
        raise ValueError(
            f"model: a {type(module).__name__} has parameters, expected linear layers and Conv2d only"
        )
    for name, child in module.named_children():
        setattr(module, name, _variational(child, generator))
    return module


def _draw(layers: dict[str, Flipout]) -> dict[str, Tensor]:
    """Weights of the whole network, by its own names."""
    return {f"{name}.{own}": w for name, layer in layers.items() for own, w in layer.draws().items()}


def _nll(logits: Float[Tensor, "S N C"], y: Int[Tensor, " N"]) -> float:
    """Of the mean probabilities, in nats per example."""
    return F.nll_loss(logits.log_softmax(-1).logsumexp(0) - math.log(len(logits)), y).item()
