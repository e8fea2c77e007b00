"""Scores of probabilities, and what one distribution says of its own uncertainty."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.metrics._check import classes, distributions


def nll(
    probabilities: Float[Tensor, "*N C"],
    targets: Int[Tensor, "*N"],
    *,
    log: bool = False,
    ignore_index: int | None = None,
) -> Float[Tensor, ""]:
    """The mean negative log-likelihood in nats, ``-log p[target]``.

    Nothing is clipped: a target of probability zero costs infinity, where `sklearn.metrics.log_loss` takes the dtype's
    precision for it. In float32 a probability below 1e-45 is zero; its logarithm need not be infinite (`log`).

    Args:
        probabilities: classes along the last axis; one column holds the probability of a one.
        targets: labels.
        log: whether `probabilities` holds logarithms of probabilities, as `torch.log_softmax` gives.
        ignore_index: the label of targets that do not count.

    Raises:
        OutputError: if the probabilities are out of range or do not sum to one.
        DataError: if the targets are no labels of theirs, or none of them counts.
    """
    p, y = classes(probabilities, targets, ignore_index, log=log)
    return surprise(p if log else p.log(), y).mean()


def accuracy(
    probabilities: Float[Tensor, "*N C"], targets: Int[Tensor, "*N"], *, ignore_index: int | None = None
) -> Float[Tensor, ""]:
    """The share of targets that have the largest probability; of equal ones the first counts. See `nll`."""
    return hits(*classes(probabilities, targets, ignore_index)).mean()


def brier(
    probabilities: Float[Tensor, "*N C"], targets: Int[Tensor, "*N"], *, ignore_index: int | None = None
) -> Float[Tensor, ""]:
    """The mean of ``sum_c (p_c - [c = target])^2`` (Brier, 1950), between 0 and 2. See `nll`."""
    return squared_distance(*classes(probabilities, targets, ignore_index)).mean()


def entropy(probabilities: Float[Tensor, "*N C"]) -> Float[Tensor, "*N"]:
    """``-sum_c p_c log p_c`` in nats, of each distribution, float64.

    Raises:
        OutputError: if the probabilities are out of range or do not sum to one.
    """
    return torch.special.entr(distributions(probabilities)).sum(-1)


def max_probability(probabilities: Float[Tensor, "*N C"]) -> Float[Tensor, "*N"]:
    """``max_c p_c`` of each distribution, the confidence of its prediction, float64.

    Raises:
        OutputError: if the probabilities are out of range or do not sum to one.
    """
    return distributions(probabilities).amax(-1)


# -- of each distribution, already checked; what `evaluate` sums up ---------------------------------------------------


def surprise(log_p: Float[Tensor, "M C"], y: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """``-log p[y]``."""
    return -log_p.gather(-1, y[:, None]).squeeze(-1)


def hits(p: Float[Tensor, "M C"], y: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """One where the largest probability is that of the target."""
    return (p.argmax(-1) == y).to(p)


def squared_distance(p: Float[Tensor, "M C"], y: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """``|p - e_y|^2``."""
    return p.scatter_add(-1, y[:, None], -torch.ones_like(p[:, :1])).square().sum(-1)
