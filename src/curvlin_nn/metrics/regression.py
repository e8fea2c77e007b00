"""Scores of Gaussian predictions, calibration and sharpness of their intervals.

Predictions are ``N(mean, variance)`` of the *observations*: ask a posterior with ``observation_noise=True``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError
from curvlin_nn._check import numbers
from curvlin_nn.errors import OutputError
from curvlin_nn.metrics._check import gaussians, not_empty, paired, positive


def gaussian_nll(
    mean: Float[Tensor, N * C], variance: Tensor, targets: Float[Tensor, N * C]
) -> Float[Tensor, ""]:
    """The mean over samples of ``-log N(target; mean, variance)`` in nats, normaliser included.

    The density is that of all outputs of a sample together, so it grows with their number.

    Args:
        mean: of each sample.
        variance: of each output in the shape of the mean, or covariances ``(N, K, K)`` of the K outputs of a sample.
        targets: in the shape of the mean.

    Raises:
        OutputError: if a mean is not finite, a variance not positive and finite, or of another shape.
        DataError: if targets have another shape than the mean, there are none, or they are not finite.
        NotPositiveDefiniteError: if a covariance is not.
    """
    return gaussian_surprise(*gaussians(mean, variance, targets)).mean()


def crps(
    mean: Float[Tensor, N * C], variance: Float[Tensor, N * C], targets: Float[Tensor, N * C]
) -> Float[Tensor, ""]:
    """The continuous ranked probability score of Gaussian predictions, in the units of the targets.

    ``E |Y - y| - E |Y - Y'| / 2 = sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))`` with
    ``z = (y - mean) / sigma`` (Gneiting & Raftery, 2007, eq. 21), averaged over samples and outputs. See
    `gaussian_nll`; of covariances only the diagonal counts.
    """
    return ranked_probability(*gaussians(mean, variance, targets)).mean()


def crps_from_samples(samples: Float[Tensor, S * N * C], targets: Float[Tensor, N * C]) -> Float[Tensor, ""]:
    """The same score from draws of the prediction, without bias whatever their number (Ferro, 2014).

    ``mean_s |Y_s - y| - sum_{s < t} |Y_s - Y_t| / (S (S - 1))``, sorted first. (`torchmetrics` divides by ``S^2``,
    which scores the draws themselves and is larger by ``E |Y - Y'| / (2 S)``.)

    Args:
        samples: S draws, at least two.
        targets: in the shape of one draw.

    Raises:
        OutputError: if there are fewer than two draws, or one is not finite.
        DataError: if targets have another shape, there are none, or they are not finite.
    """
    if samples.ndim < 2 or len(samples) < 2:
        raise OutputError(f"samples must have shape (S, N, ...) with S >= 2, found {tuple(samples.shape)}")
    _, y = paired(samples[0], targets)
    n, draws = len(samples), paired(samples, samples)[0].reshape(-1, *y.shape)
    # The s-th smallest of n draws stands on the larger side of s pairs, and on the smaller one of n - 1 - s.
    rank = torch.arange(n, dtype=draws.dtype, device=draws.device)
    spread = torch.einsum("s,snk->nk", 2 * rank - (n - 1), draws.sort(0).values) / (n * (n - 1))
    return ((draws - y).abs().mean(0) - spread).mean()


def rmse(mean: Float[Tensor, N * C], targets: Float[Tensor, N * C]) -> Float[Tensor, ""]:
    """The root of the mean squared error over samples and outputs, in the units of the targets.

    Raises:
        OutputError: if a mean is not finite.
        DataError: if shapes differ, there are no samples, or a target is not finite.
    """
    rows, y = paired(mean, targets)
    return (rows - y).square().mean().sqrt()


def interval_coverage(
    mean: Float[Tensor, N * C],
    variance: Float[Tensor, N * C],
    targets: Float[Tensor, N * C],
    level: float | Sequence[float] | Tensor = 0.95,
) -> Float[Tensor, "*L"]:
    """The share of targets within the central interval of a nominal level, over samples and outputs.

    Args:
        mean: of each sample.
        variance: in the shape of the mean; of covariances only the diagonal counts.
        targets: in the shape of the mean.
        level: the probability that the interval should hold, or several.

    Returns:
        In the shape of `level`; of calibrated predictions, `level` itself.

    Raises:
        ValueError: if a level is not between 0 and 1.
        OutputError, DataError: see `gaussian_nll`.
    """
    wanted = levels(level).to(mean.device)
    p = central_probability(*gaussians(mean, variance, targets)).flatten()
    return (p <= wanted[..., None]).double().mean(-1)


def sharpness(variance: Float[Tensor, "*N"]) -> Float[Tensor, ""]:
    """The root of the mean predictive variance, in the units of the targets (Kuleshov et al., 2018).

    Of calibrated predictions it is the RMSE; the smaller, the better.

    Raises:
        OutputError: if a variance is not positive and finite.
        DataError: if there are none.
    """
    positive(not_empty(variance, "variances"))
    return variance.double().mean().sqrt()


# -- of each sample or output, already checked; what `evaluate` sums up -----------------------------------------------


def gaussian_surprise(
    mean: Float[Tensor, "N K"], spread: Tensor, y: Float[Tensor, "N K"]
) -> Float[Tensor, " N"]:
    """``-log N(y; mean, spread)`` of variances or covariances."""
    constant = mean.shape[1] * math.log(2 * math.pi)
    if spread.ndim == 2:
        return ((y - mean).square() / spread + spread.log()).sum(-1) / 2 + constant / 2
    root, info = torch.linalg.cholesky_ex(spread)
    if bool((info > 0).any()):
        least = torch.linalg.eigvalsh(spread[info > 0][0])[0]
        raise NotPositiveDefiniteError("a predictive covariance", float(least))
    z = torch.linalg.solve_triangular(root, (y - mean)[..., None], upper=False).squeeze(-1)
    logdet = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (z.square().sum(-1) + logdet + constant) / 2


def ranked_probability(
    mean: Float[Tensor, "N K"], spread: Tensor, y: Float[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """The CRPS of each output."""
    sigma = variances(spread).sqrt()
    error = y - mean
    z = error / sigma
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return error * torch.erf(z / math.sqrt(2)) + sigma * (2 * density - 1 / math.sqrt(math.pi))


def central_probability(
    mean: Float[Tensor, "N K"], spread: Tensor, y: Float[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """The level of the smallest central interval that holds the target, ``P(|Y - mean| <= |y - mean|)``."""
    return torch.erf((y - mean).abs() / (2 * variances(spread)).sqrt())


def levels(level: float | Sequence[float] | Tensor) -> Float[Tensor, "*L"]:
    """Nominal levels as float64.

    Raises:
        ValueError: if one is not between 0 and 1.
    """
    wanted = numbers("level", level).double()
    if wanted.numel() == 0 or not bool(((wanted > 0) & (wanted < 1)).all()):
        raise ValueError(f"level must lie between 0 and 1, found {level}")
    return wanted


def variances(spread: Tensor) -> Float[Tensor, "N K"]:
    """The variance of each output."""
    return spread if spread.ndim == 2 else spread.diagonal(dim1=-2, dim2=-1)
