"""The Bradley-Terry likelihood of pairwise preferences: reward modelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.errors import OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import Likelihood, systematic_uniforms
from curvlin_nn.likelihoods.registry import register


@register
class Preference(Likelihood):
    """The first of a pair is preferred with probability ``sigmoid(d)``, ``d = r_0 - r_1`` the difference of rewards.

    The model gives both rewards, ``(N, 2)``, or d itself, ``(N,)`` or ``(N, 1)``; targets are 0 or 1, the place of the
    preferred one. ``Lambda = p (1 - p) e e^T`` with ``e = (1, -1)`` or ``(1)``, of rank one, is both the Hessian and
    the Fisher information (Bradley & Terry, 1952). Predictions are moments of the rewards, as of a regression.
    """

    name = "reward_modeling"
    has_link = False
    has_classes = True

    def check(self, outputs: Float[Tensor, N * T], targets: Tensor, where: str) -> Int[Tensor, "N R"]:
        """See `Likelihood.check`."""
        if outputs.ndim > 1 and outputs.shape[-1] > 2:
            raise OutputError(
                f"outputs on {where} must be the rewards of a pair or their difference, found shape "
                f"{tuple(outputs.shape)}"
            )
        _check.labels(targets, 2, where)
        _check.target_shape(targets, outputs.shape[:-1] if outputs.ndim > 1 else outputs.shape, where)
        return targets.long().reshape(len(targets), -1)

    def rank(self, event: int) -> int:
        """One: only the difference matters."""
        return 1

    def root(self, terms: Float[Tensor, "N R E"], targets: Tensor) -> Float[Tensor, "N R E 1"]:
        """``sqrt(p (1 - p)) e``."""
        d = _difference(terms)
        return _along(((F.logsigmoid(d) + F.logsigmoid(-d)) / 2).exp(), terms)[..., None]

    def draw(
        self, terms: Float[Tensor, "N R E"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Int[Tensor, "K N R"]:
        """Places at evenly spread probabilities."""
        p = torch.sigmoid(_difference(terms.double()))
        return (systematic_uniforms(p.shape, n_draws, p, generator) >= p).long()

    def score(
        self, terms: Float[Tensor, "N R E"], targets: Int[Tensor, "*K N R"]
    ) -> Float[Tensor, "*K N R E"]:
        """``-s sigmoid(-s d) e`` with s = 1 where the first is preferred, -1 where the second is."""
        d, s = _difference(terms), (1 - 2 * targets).to(terms)
        return _along(-s * torch.sigmoid(-s * d), terms)

    def log_prob(self, terms: Float[Tensor, "N R E"], targets: Int[Tensor, "N R"]) -> Float[Tensor, "N R"]:
        """``log sigmoid(s d)``."""
        return F.logsigmoid((1 - 2 * targets).to(terms) * _difference(terms))

    def log_probabilities(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch 2"]:
        """Of preferring the first and the second."""
        d = _difference(terms)
        return torch.stack([F.logsigmoid(d), F.logsigmoid(-d)], dim=-1)

    def link(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """The rewards themselves: what a reward model is asked for."""
        return terms


def _difference(terms: Float[Tensor, "N R E"]) -> Float[Tensor, "N R"]:
    """d."""
    return terms[..., 0] - terms[..., 1] if terms.shape[-1] == 2 else terms[..., 0]


def _along(values: Float[Tensor, "*K N R"], terms: Float[Tensor, "N R E"]) -> Float[Tensor, "*K N R E"]:
    """``values e``."""
    return torch.stack([values, -values], dim=-1) if terms.shape[-1] == 2 else values[..., None]
