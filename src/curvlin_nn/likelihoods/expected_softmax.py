"""Closed forms of ``E softmax(f)`` for Gaussian logits f; none is exact.

probit        each logit shrunk by its own variance (MacKay, 1992; Gibbs, 1997)
mean_field    each difference of two logits shrunk by its own variance (Lu, Ie & Sha, 2020)
bridge        the mean of the Dirichlet distribution whose logits have the same mode and curvature (Hobbhahn,
              Kristiadi & Hennig, 2022, Fast predictive uncertainty for classification with Bayesian deep networks)
bridge_norm   the same for logits scaled to a fixed mean variance

A softmax does not change when all logits move together. The probit formula does: it counts that part of the variance
as if it were uncertainty about the class. The mean-field formula does not. The bridges condition the logits on a sum of
zero, as the paper has it: a shift of all logits that their mean has counts where their variances differ.

All of them are computed from logarithms, and change none of their arguments.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def probit(mean: Float[Tensor, "*batch E"], variance: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
    """Each logit shrunk by ``(1 + pi/8 variance)^(-1/2)``.

    Only a logit's own variance counts, as is usual; its covariances with the others do not.
    """
    return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), dim=-1)


def mean_field(
    mean: Float[Tensor, "*batch E"], covariance: Float[Tensor, "*batch E E"]
) -> Float[Tensor, "*batch E"]:
    """``p_k ~ 1 / sum_i exp(-(m_k - m_i) / sqrt(1 + pi/8 Var(f_k - f_i)))``, normalised; "mf2" of the paper.

    With two classes it is the probit approximation of the logistic function of their difference.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = (variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance).clamp(min=0)
    gaps = (mean.unsqueeze(-1) - mean.unsqueeze(-2)) / torch.sqrt(1 + math.pi / 8 * spread)
    return torch.softmax(-torch.logsumexp(-gaps, dim=-1), dim=-1)


def bridge(
    mean: Float[Tensor, "*batch E"], covariance: Float[Tensor, "*batch E E"]
) -> Float[Tensor, "*batch E"]:
    """``p ~ alpha`` with ``alpha_k = (1 - 2/K + exp(m_k) sum_l exp(-m_l) / K^2) / V_kk``, given logits of sum zero.

    With two classes both variances are one number, which cancels: the prediction is the softmax of that mean.
    """
    return torch.softmax(_log_alpha(*_of_sum_zero(mean, covariance)), dim=-1)


def bridge_norm(
    mean: Float[Tensor, "*batch E"], covariance: Float[Tensor, "*batch E E"]
) -> Float[Tensor, "*batch E"]:
    """The bridge for ``m / sqrt(c)`` and ``V / c`` with ``c = mean_k V_kk / sqrt(K / 2)``.

    Variances below one sharpen the prediction, so that it tends to the most probable class, and not to the softmax of
    the mean, as they vanish; where they are zero nothing is scaled.
    """
    mean, variance = _of_sum_zero(mean, covariance)
    c = variance.mean(-1, keepdim=True) / math.sqrt(mean.shape[-1] / 2)
    c = torch.where(c > 0, c, 1.0)
    return torch.softmax(_log_alpha(mean / c.sqrt(), variance / c), dim=-1)


def _log_alpha(
    mean: Float[Tensor, "*batch K"], variance: Float[Tensor, "*batch K"]
) -> Float[Tensor, "*batch K"]:
    """The logarithms of the parameters of the Dirichlet distribution."""
    K = mean.shape[-1]
    constant = mean.new_full((), 1 - 2 / K).log()
    grown = mean + torch.logsumexp(-mean, dim=-1, keepdim=True) - 2 * math.log(K)
    return torch.logaddexp(constant, grown) - variance.log()


def _of_sum_zero(
    mean: Float[Tensor, "*batch K"], covariance: Float[Tensor, "*batch K K"]
) -> tuple[Float[Tensor, "*batch K"], Float[Tensor, "*batch K"]]:
    """Mean and variances of the logits given that their sum is zero, which a softmax does not see.

    A variance that is zero but for rounding (of all logits, if at all) counts as equal to the others: scaling them
    together changes nothing.
    """
    rows = covariance.sum(-1)
    total = rows.sum(-1, keepdim=True)
    own = covariance.diagonal(dim1=-2, dim2=-1)
    rounding = 8 * mean.shape[-1] * torch.finfo(mean.dtype).eps * own.sum(-1, keepdim=True)
    known = total <= rounding  # the sum is certain already, and only taken out of the mean
    share = torch.where(known, 1 / mean.shape[-1], rows / torch.where(known, 1.0, total))
    variance = own - torch.where(known, 0.0, share * rows)
    floor = torch.where(rounding > 0, rounding, 1.0)
    return mean - share * mean.sum(-1, keepdim=True), variance.clamp(min=floor)
