"""The categorical likelihood with softmax link: classification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.likelihoods.base import Likelihood, LinkApproximation, systematic_uniforms
from curvlin_nn.likelihoods.registry import register


def probit(mean: Float[Tensor, "N C"], variance: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """MacKay's approximation of the expected softmax: each logit shrunk by ``(1 + pi/8 variance)^(-1/2)``.

    Only a logit's own variance counts, as is usual; its covariances with the others do not.
    """
    return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), dim=-1)


@register
class Categorical(Likelihood):
    """Targets in ``0 .. C-1`` with probabilities ``softmax(f)``.

    ``Lambda = diag(p) - p p^T`` is both the Hessian and the Fisher information.
    """

    name = "classification"
    has_noise = False
    link_approximations: ClassVar[Mapping[str, LinkApproximation]] = {"probit": probit}

    def check(self, outputs: Float[Tensor, "N *T C"], targets: Tensor, where: str) -> Int[Tensor, "N R"]:
        """See `Likelihood.check`."""
        n_classes = outputs.shape[-1]
        if outputs.ndim < 2 or n_classes < 2:
            raise OutputError(
                f"classification needs at least two logits per sample, found one on {where}; "
                "give the model two outputs (0 and the logit)"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise DataError(f"targets of {where} must be integer class labels, found dtype {targets.dtype}")
        if targets.shape != outputs.shape[:-1]:
            raise DataError(
                f"targets of {where} must have shape {tuple(outputs.shape[:-1])}, found {tuple(targets.shape)}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= n_classes:
            raise DataError(
                f"targets of {where} must lie in 0..{n_classes - 1} like the model's {n_classes} outputs, "
                f"found {low if low < 0 else high}"
            )
        return targets.long().reshape(len(outputs), -1)

    def root(self, terms: Float[Tensor, "N R C"], targets: Tensor) -> Float[Tensor, "N R C K"]:
        """The ``C - 1`` columns of the Cholesky factor of ``diag(p) - p p^T``.

        With ``q_i = sum_{k>i} p_k`` and ``d_i = sqrt(p_i q_i / q_{i-1})``: ``L_ii = d_i``,
        ``L_ji = -(p_j / q_i) d_i`` for j > i (Tanabe & Sagae, 1992). No differences of probabilities occur,
        so nothing cancels when a class saturates.
        """
        p = torch.softmax(terms, dim=-1)
        n_classes = p.shape[-1]
        tail = p.flip(-1).cumsum(-1).flip(-1)
        q, q_before = tail[..., 1:], tail[..., :-1]
        # p_i <= q_{i-1} and p_j <= q_i: the ratios are at most one, and 0/0 stands for an empty tail.
        share = torch.where(q_before > 0, q / q_before, 0.0)
        d = torch.sqrt(p[..., :-1] * share)
        ratio = torch.where(q[..., None, :] > 0, p[..., :, None] / q[..., None, :], 0.0)
        below = torch.ones(n_classes, n_classes, dtype=torch.bool, device=p.device).tril(-1)[:, :-1]
        on = torch.eye(n_classes, dtype=p.dtype, device=p.device)[:, :-1]
        return (on - ratio * below) * d[..., None, :]

    def draw(
        self, terms: Float[Tensor, "N R C"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Int[Tensor, "K N R"]:
        """Labels by the inverse of the distribution function, at evenly spread probabilities."""
        cumulative = torch.softmax(terms.double(), dim=-1).cumsum(-1)
        u = systematic_uniforms(terms.shape[:-1], n_draws, cumulative, generator)
        labels = (u[..., None] * cumulative[..., -1:] >= cumulative).sum(-1)
        return labels.clamp(max=terms.shape[-1] - 1)

    def score(
        self, terms: Float[Tensor, "N R C"], targets: Int[Tensor, "*K N R"]
    ) -> Float[Tensor, "*K N R C"]:
        """``p - e_y``."""
        return torch.softmax(terms, dim=-1) - F.one_hot(targets, terms.shape[-1])

    def statistics(self, outputs: Float[Tensor, "N *T C"], targets: Tensor) -> Float[Tensor, " 1"]:
        """The summed log-probability of the targets."""
        log_p = torch.log_softmax(self.terms(outputs).double(), dim=-1)
        return log_p.gather(-1, targets[..., None]).sum().reshape(1)

    def log_likelihood(
        self, statistics: Float[Tensor, " 1"], sigma_noise: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """See `Likelihood.log_likelihood`."""
        return statistics[0]

    def link(self, outputs: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Class probabilities."""
        return torch.softmax(outputs, dim=-1)
