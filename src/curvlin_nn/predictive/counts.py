"""Entropies of distributions over 0, 1, 2, ...: of each draw's, and of their mean."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.likelihoods import Likelihood

SUMMED = 2**22
"""Probabilities held at once: 32 MiB in float64."""

MOST_COUNTS = 2**20
"""The most counts that are summed over for one term; beyond, a sum over the distribution is refused."""


def entropies(
    likelihood: Likelihood, terms: Float[Tensor, "S M E"]
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Entropy of the mean over S draws, and mean of the draws' entropies, in nats.

    Sums of ``-p log p`` in float64 up to `Likelihood.largest_count`, which leaves out less than 1e-30 nats.

    Args:
        likelihood: of counts.
        terms: M of them at S draws.

    Raises:
        UnsupportedError: if counts are too large to be summed over.
    """
    terms = terms.double()
    last = likelihood.largest_count(terms).amax(0)
    if not bool((last <= MOST_COUNTS).all()):
        raise UnsupportedError(
            f"entropy sums over at most {MOST_COUNTS} counts, found rates that need {float(last.max()):.3g}; use "
            "variance, aleatoric and epistemic, or the log of the standard deviation"
        )
    of_mean, mean_of = (torch.zeros(terms.shape[1], dtype=terms.dtype, device=terms.device) for _ in range(2))
    at_once = max(1, SUMMED // terms[..., 0].numel())
    for start in range(0, int(last.max()) + 1, at_once):
        counts = torch.arange(start, start + at_once, dtype=terms.dtype, device=terms.device)
        some = (last >= start).nonzero().squeeze(1)
        # Counts stand along the axis of samples, which a log-probability takes one by one.
        chosen = terms[:, some].flatten(0, 1).expand(len(counts), -1, -1)
        targets = counts[:, None].expand(chosen.shape[:2])
        log_p = likelihood.log_prob(chosen, targets).unflatten(1, (len(terms), len(some)))
        of_mean[some] += _entropy_terms(log_p.expm1().mean(1), log_p.exp().mean(1)).sum(0)
        mean_of[some] += _entropy_terms(log_p.expm1(), log_p.exp()).sum(0).mean(0)
    return of_mean, mean_of


def _entropy_terms(less_one: Tensor, p: Tensor) -> Tensor:
    """``-p log p`` from ``p - 1`` where p is near one, as that of no event is where rates are small."""
    return torch.where(less_one > -0.5, -(1 + less_one) * less_one.log1p(), torch.special.entr(p))
