"""The Bernoulli likelihood with logistic link: binary and multi-label classification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import Likelihood, LinkApproximation, systematic_uniforms
from curvlin_nn.likelihoods.registry import register


def scalar_probit(
    mean: Float[Tensor, "*batch E"], variance: Float[Tensor, "*batch E"]
) -> Float[Tensor, "*batch E"]:
    """``E sigmoid(f) ~ sigmoid(mean / sqrt(1 + pi/8 variance))`` (MacKay, 1992)."""
    return torch.sigmoid(mean / torch.sqrt(1 + math.pi / 8 * variance))


@register
class Bernoulli(Likelihood):
    """Every output is the logit of a target in {0, 1}, or of one between: ``p = sigmoid(f)``.

    The log-likelihood of a term is ``t_1 log p + t_0 log(1 - p)`` with ``t_1 = weight pos_weight y`` and
    ``t_0 = weight (1 - y)``, as in `torch.nn.functional.binary_cross_entropy_with_logits`. The Hessian is
    ``(t_0 + t_1) p (1 - p)``: the sum is the term's weight. It is the Fisher information as well.

    Args:
        weight: of the outputs of a sample, broadcast to their shape; None for one.
        pos_weight: likewise, of the targets that are one.
    """

    name = "binary"
    link_approximations: Mapping[str, LinkApproximation] = {"probit": scalar_probit}
    event_ndim = 0
    has_classes = True

    def __init__(
        self, weight: float | Tensor | None = None, pos_weight: float | Tensor | None = None
    ) -> None:
        self.weight = _check.weights("weight", 1.0 if weight is None else weight)
        self.pos_weight = _check.weights("pos_weight", 1.0 if pos_weight is None else pos_weight)

    def options(self) -> dict[str, Any]:
        """See `Likelihood.options`."""
        return {"weight": self.weight, "pos_weight": self.pos_weight}

    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Float[Tensor, "N R 2"]:
        """``(t_0, t_1)`` of each term."""
        if targets.is_complex():
            raise DataError(f"targets of {where} must be real, found dtype {targets.dtype}")
        _check.target_shape(targets, outputs.shape, where)
        y = targets.double()
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise DataError(f"targets of {where} must lie between 0 and 1, found {_outside(y)}")
        weight = _of_outputs("weight", self.weight, outputs, where)
        pos_weight = _of_outputs("pos_weight", self.pos_weight, outputs, where)
        return torch.stack([weight * (1 - y), weight * pos_weight * y], dim=-1).reshape(len(y), -1, 2)

    def weights(self, terms: Float[Tensor, "N R 1"], targets: Float[Tensor, "N R 2"]) -> Float[Tensor, "N R"]:
        """``t_0 + t_1``."""
        return targets.sum(-1).to(terms)

    def root(self, terms: Float[Tensor, "N R 1"], targets: Tensor) -> Float[Tensor, "N R 1 1"]:
        """``sqrt(p (1 - p))``, from logarithms: nothing cancels when p is close to one."""
        return ((F.logsigmoid(terms) + F.logsigmoid(-terms)) / 2).exp()[..., None]

    def draw(
        self, terms: Float[Tensor, "N R 1"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Float[Tensor, "K N R 2"]:
        """Zeros and ones at evenly spread probabilities, as ``(t_0, t_1)``."""
        p = torch.sigmoid(terms.double()).squeeze(-1)
        ones = (systematic_uniforms(p.shape, n_draws, p, generator) < p).double()
        return torch.stack([1 - ones, ones], dim=-1)

    def score(
        self, terms: Float[Tensor, "N R 1"], targets: Float[Tensor, "*K N R 2"]
    ) -> Float[Tensor, "*K N R 1"]:
        """``(t_0 p - t_1 (1 - p)) / (t_0 + t_1)``."""
        shares = _shares(targets, terms)
        return shares[..., :1] * torch.sigmoid(terms) - shares[..., 1:] * torch.sigmoid(-terms)

    def log_prob(
        self, terms: Float[Tensor, "N R 1"], targets: Float[Tensor, "N R 2"]
    ) -> Float[Tensor, "N R"]:
        """``(t_1 log p + t_0 log(1 - p)) / (t_0 + t_1)``."""
        shares = _shares(targets, terms)
        return (shares * self.log_probabilities(terms)).sum(-1)

    def log_probabilities(self, terms: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 2"]:
        """Of a zero and a one."""
        return torch.cat([F.logsigmoid(-terms), F.logsigmoid(terms)], dim=-1)

    def link(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The probability of a one."""
        return torch.sigmoid(terms)

    def inverse_link(self, prediction: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Logits."""
        return torch.logit(prediction)


def _shares(targets: Float[Tensor, "*K N R 2"], terms: Tensor) -> Float[Tensor, "*K N R 2"]:
    """``t / (t_0 + t_1)``, zero where both are."""
    total = targets.sum(-1, keepdim=True)
    return torch.where(total > 0, targets / total, 0.0).to(terms)


def _of_outputs(name: str, weight: Tensor, outputs: Tensor, where: str) -> Tensor:
    """The weight of each output of a sample, to be multiplied with ``(N, *T)``."""
    shape = outputs.shape[1:] or torch.Size([1])
    fits = weight.ndim <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(weight.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise OutputError(
            f"outputs of a sample on {where} must have a shape that {name} {tuple(weight.shape)} broadcasts to, found "
            f"{tuple(outputs.shape[1:])}"
        )
    return weight.to(outputs.device).expand(shape).reshape(outputs.shape[1:])


def _outside(y: Tensor) -> float:
    return float(y[~((y >= 0) & (y <= 1))][0])
