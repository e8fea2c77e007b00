"""The categorical likelihood with softmax link: classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.likelihoods import _check
from curvlin_nn.likelihoods.base import (
    CovarianceLink,
    Likelihood,
    LinkApproximation,
    systematic_uniforms,
    weighted,
)
from curvlin_nn.likelihoods.expected_softmax import bridge, bridge_norm, mean_field, probit
from curvlin_nn.likelihoods.registry import register


@register
class Categorical(Likelihood):
    """Targets in ``0 .. C-1`` with probabilities ``p = softmax(f)``.

    The log-likelihood of a term is ``sum_c t_c log p_c`` with ``t = weight * target``, the target a one-hot row or
    probabilities, smoothed towards 1/C as `torch.nn.functional.cross_entropy` does. The Hessian is
    ``(sum_c t_c) (diag(p) - p p^T)``: the sum is the term's weight, so that smoothing alone leaves the curvature as it
    is. It is the Fisher information as well. A term that is ignored, or whose t is zero, does not exist.

    Args:
        weight: one number for each class.
        label_smoothing: the share of each target that is spread evenly over the classes.
        ignore_index: the label of terms that do not count. None refuses labels out of range.
        class_dim: the axis of the outputs that holds the classes: the last, or 1 as torch's losses have it.
    """

    name = "classification"
    has_classes = True
    link_approximations: Mapping[str, LinkApproximation] = {"probit": probit}
    covariance_links: Mapping[str, CovarianceLink] = {
        "mean_field": mean_field,
        "bridge": bridge,
        "bridge_norm": bridge_norm,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        class_dim: int = -1,
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], found {label_smoothing}")
        if class_dim == 0:
            raise ValueError("class_dim must not be 0, the axis of samples, expected -1 or 1")
        self.weight = None if weight is None else _check.weights("weight", weight)
        if self.weight is not None and self.weight.ndim != 1:
            raise ValueError(
                f"weight must hold a number for each class, found shape {tuple(self.weight.shape)}"
            )
        self.label_smoothing, self.ignore_index, self.class_dim = label_smoothing, ignore_index, class_dim

    def options(self) -> dict[str, Any]:
        """See `Likelihood.options`."""
        names = ("weight", "label_smoothing", "ignore_index", "class_dim")
        return {name: getattr(self, name) for name in names}

    def check(
        self, outputs: Float[Tensor, N * T], targets: Tensor, where: str
    ) -> Int[Tensor, "N R"] | Float[Tensor, "N R C"]:
        """Labels, -1 where ignored; or t of the class's docstring, if targets are soft or smoothed."""
        axis = self._axis(outputs, where)
        n_classes = outputs.shape[axis]
        soft = targets.is_floating_point() and targets.shape == outputs.shape
        if not soft:
            self._check_shape(outputs, targets, where)
        if self.weight is not None and len(self.weight) != n_classes:
            raise OutputError(
                f"outputs on {where} must have {len(self.weight)} classes like weight, found {n_classes}"
            )
        if soft:
            if not bool(((targets >= 0) & torch.isfinite(targets)).all()):
                raise DataError(f"probabilities of {where} must be finite and not negative")
            return self._soft(self.terms(targets).double())
        kept = torch.ones_like(targets, dtype=torch.bool)
        if self.ignore_index is not None:
            kept = targets != self.ignore_index
        _check.labels(targets[kept], n_classes, where)
        labels = torch.where(kept, targets.long(), -1).reshape(len(outputs), -1)
        if not self.label_smoothing:
            return labels
        one_hot = F.one_hot(labels.clamp(min=0), n_classes).double()
        return torch.where(labels[..., None] >= 0, self._soft(one_hot), 0.0)

    def _check_shape(self, outputs: Tensor, targets: Tensor, where: str) -> None:
        """Whether there is one label for each term.

        Raises:
            DataError: if there is not; it says which axis of classes these labels would fit.
        """
        by_axis = [outputs.movedim(axis, -1).shape[:-1] for axis in range(outputs.ndim)]
        expected = by_axis[self.class_dim]
        if targets.shape != expected and targets.shape in by_axis[1:]:
            fits = by_axis.index(targets.shape, 1)
            raise DataError(
                f"targets of {where} must have shape {tuple(expected)} as classes stand along axis {self.class_dim} of "
                f"the outputs, found {tuple(targets.shape)}; take likelihoods.Categorical(class_dim={fits})"
            )
        _check.target_shape(targets, expected, where)

    def _axis(self, outputs: Tensor, where: str) -> int:
        """The axis of classes, counted from the right."""
        axis = self.class_dim if self.class_dim < 0 else self.class_dim - outputs.ndim
        if outputs.ndim < 2 or not -outputs.ndim < axis < 0:
            raise OutputError(
                f"outputs on {where} must have classes along axis {self.class_dim}, found shape {tuple(outputs.shape)}"
            )
        if outputs.shape[axis] < 2:
            raise OutputError(
                f"classification needs at least two logits per sample, found one on {where}; "
                "use likelihood='binary', or give the model two outputs (0 and the logit)"
            )
        return axis

    def _soft(self, targets: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
        """Smoothed, and weighted by class."""
        smooth = torch.lerp(targets, torch.full_like(targets, 1 / targets.shape[-1]), self.label_smoothing)
        return smooth if self.weight is None else smooth * self.weight.to(smooth)

    def terms(self, outputs: Float[Tensor, N * T]) -> Float[Tensor, "N R C"]:
        """See `Likelihood.terms`."""
        last = outputs.movedim(self.class_dim, -1)
        return last.reshape(len(outputs), -1, last.shape[-1])

    def outputs(
        self, terms: Float[Tensor, "*V N R C"], like: Float[Tensor, N * T]
    ) -> Float[Tensor, "*V N *T"]:
        """See `Likelihood.outputs`."""
        shape = like.movedim(self.class_dim, -1).shape
        axis = self.class_dim if self.class_dim < 0 else self.class_dim - like.ndim
        return terms.reshape(*terms.shape[:-3], *shape).movedim(-1, axis)

    def weights(self, terms: Float[Tensor, "N R C"], targets: Tensor) -> Float[Tensor, "N R"] | None:
        """``sum_c t_c``."""
        if targets.is_floating_point():
            return targets.sum(-1).to(terms)
        if self.weight is not None:
            return torch.where(targets >= 0, self.weight.to(terms)[targets.clamp(min=0)], 0.0)
        return None if self.ignore_index is None else (targets >= 0).to(terms)

    def rank(self, event: int) -> int:
        """C - 1: a shift of all logits changes nothing."""
        return event - 1

    def root(self, terms: Float[Tensor, "N R C"], targets: Tensor) -> Float[Tensor, "N R C K"]:
        """The ``C - 1`` columns of the Cholesky factor of ``diag(p) - p p^T``.

        With ``q_i = sum_{k>i} p_k`` and ``d_i = sqrt(p_i q_i / q_{i-1})``: ``L_ii = d_i``,
        ``L_ji = -(p_j / q_i) d_i`` for j > i (Tanabe & Sagae, 1992). No differences of probabilities occur,
        so nothing cancels when a class saturates.
        """
        p, q, d = _cholesky(terms)
        n_classes = p.shape[-1]
        # p_j <= q_i: the ratios are at most one, and 0/0 stands for an empty tail.
        ratio = torch.where(q[..., None, :] > 0, p[..., :, None] / q[..., None, :], 0.0)
        below = torch.ones(n_classes, n_classes, dtype=torch.bool, device=p.device).tril(-1)[:, :-1]
        on = torch.eye(n_classes, dtype=p.dtype, device=p.device)[:, :-1]
        return (on - ratio * below) * d[..., None, :]

    def curvature_diagonal(self, terms: Float[Tensor, "N R C"], targets: Tensor) -> Float[Tensor, "N R C"]:
        """``p_c (1 - p_c)``, the second factor as the sum of the other probabilities: it is not rounded away."""
        p = torch.softmax(terms, dim=-1)
        before = F.pad(p[..., :-1].cumsum(-1), (1, 0))
        behind = F.pad(p[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
        return p * (before + behind)

    def total_curvature(
        self, terms: Float[Tensor, "N R C"], targets: Tensor, weights: Float[Tensor, "N R"] | None
    ) -> Float[Tensor, "C C"]:
        """``sum w (diag(p) - p p^T)``: one product of matrices, and no columns."""
        p = torch.softmax(terms, dim=-1).flatten(0, 1)
        diagonal = self.curvature_diagonal(terms, targets)
        if weights is not None:
            diagonal, p = weighted(diagonal, weights[..., None]), weighted(p, weights.sqrt().reshape(-1, 1))
        total = -(p.mT @ p)
        total.diagonal().copy_(diagonal.sum((0, 1)))
        return total

    def root_product(
        self, terms: Float[Tensor, "N R C"], targets: Tensor, Q: Float[Tensor, "N R K V"]
    ) -> Float[Tensor, "N R C V"]:
        """``(L Q)_j = d_j Q_j - p_j sum_{i<j} (d_i / q_i) Q_i``, in C V operations instead of C^2 V."""
        p, q, d = _cholesky(terms)
        ratio = torch.where(q > 0, d / q, 0.0)
        above = F.pad((ratio[..., None] * Q).cumsum(-2), (0, 0, 1, 0))
        return F.pad(d[..., None] * Q, (0, 0, 0, 1)) - p[..., None] * above

    def draw(
        self, terms: Float[Tensor, "N R C"], targets: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> Int[Tensor, "K N R"]:
        """Labels by the inverse of the distribution function, at evenly spread probabilities."""
        cumulative = torch.softmax(terms.double(), dim=-1).cumsum(-1)
        u = systematic_uniforms(terms.shape[:-1], n_draws, cumulative, generator)
        labels = (u[..., None] * cumulative[..., -1:] >= cumulative).sum(-1)
        return labels.clamp(max=terms.shape[-1] - 1)

    def score(self, terms: Float[Tensor, "N R C"], targets: Tensor) -> Float[Tensor, "*K N R C"]:
        """``p - t / sum_c t_c``; ``p - e_y`` for labels."""
        return torch.softmax(terms, dim=-1) - _shares(targets, terms)

    def log_prob(self, terms: Float[Tensor, "N R C"], targets: Tensor) -> Float[Tensor, "N R"]:
        """``sum_c t_c log p_c / sum_c t_c``."""
        log_p = torch.log_softmax(terms, dim=-1)
        if targets.is_floating_point():
            return (_shares(targets, terms) * log_p).sum(-1)
        return log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)

    def log_probabilities(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Of the classes."""
        return torch.log_softmax(terms, dim=-1)

    def link(self, terms: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Class probabilities."""
        return torch.softmax(terms, dim=-1)

    def inverse_link(self, prediction: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Logarithms of probabilities."""
        return prediction.log()


def _cholesky(
    terms: Float[Tensor, "N R C"],
) -> tuple[Float[Tensor, "N R C"], Float[Tensor, "N R K"], Float[Tensor, "N R K"]]:
    """p, q and d of `Categorical.root`."""
    p = torch.softmax(terms, dim=-1)
    tail = p.flip(-1).cumsum(-1).flip(-1)
    q, q_before = tail[..., 1:], tail[..., :-1]
    share = torch.where(q_before > 0, q / q_before, 0.0)
    return p, q, torch.sqrt(p[..., :-1] * share)


def _shares(targets: Tensor, terms: Float[Tensor, "N R C"]) -> Float[Tensor, "*K N R C"]:
    """``t / sum_c t_c``, zero where no class has any."""
    if not targets.is_floating_point():
        return F.one_hot(targets.clamp(min=0), terms.shape[-1]).to(terms)
    total = targets.sum(-1, keepdim=True)
    return torch.where(total > 0, targets / total, 0.0).to(terms)
