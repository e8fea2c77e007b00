"""Predictions and targets in the one form that the scores take, or an error that says what is wrong with them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.errors import DataError, OutputError


def distributions(probabilities: Float[Tensor, "*N C"], *, log: bool = False) -> Float[Tensor, "*N C"]:
    """Probabilities in float64, of two classes where one column holds the probability of a one.

    Args:
        probabilities: classes along the last axis.
        log: whether they are logarithms, which stay so.

    Raises:
        OutputError: if they are not floating, not finite, out of range or do not sum to one within the square root of
            their dtype's precision.
    """
    name = "log_probabilities" if log else "probabilities"
    if not tensor(name, probabilities, OutputError).is_floating_point():
        raise OutputError(f"{name} must be a floating tensor, found {probabilities.dtype}")
    if probabilities.ndim < 2 or probabilities.shape[-1] == 0:
        raise OutputError(
            f"{name} must have shape (N, ..., C) with classes along the last axis, found shape "
            f"{tuple(probabilities.shape)}; one probability of a one for each sample is p.unsqueeze(-1)"
        )
    p = probabilities.double()
    least, largest = (-math.inf, 0.0) if log else (0.0, 1.0)
    tolerance = torch.finfo(probabilities.dtype).eps ** 0.5
    inside = (p >= least) & (p <= largest + tolerance)
    if not bool(inside.all()):
        raise OutputError(f"{name} must lie in [{least:g}, {largest:g}], found {float(p[~inside][0]):g}")
    if p.shape[-1] == 1:
        p = p.clamp(max=largest)
        return torch.cat([_log_of_rest(p) if log else 1 - p, p], dim=-1)
    totals = p.logsumexp(-1).exp() if log else p.sum(-1)
    off = (totals - 1).abs() > tolerance
    if bool(off.any()):
        raise OutputError(
            f"{name} must sum to one over the last axis, found a sum of {float(totals[off][0]):g}; logits go through "
            "softmax first"
        )
    return p


def _log_of_rest(log_p: Tensor) -> Tensor:
    """``log(1 - p)``, by the form that does not cancel (Maechler, 2012)."""
    return torch.where(log_p > -math.log(2), (-torch.expm1(log_p)).log(), torch.log1p(-log_p.exp()))


def labels(
    p: Float[Tensor, "*N C"], targets: Tensor, ignore_index: int | None, n_columns: int
) -> tuple[Float[Tensor, "M C"], Int[Tensor, " M"]]:
    """The distributions and labels of the terms that count, side by side.

    Args:
        p: from `distributions`.
        targets: a label for each distribution; zeros and ones of any dtype where there was one column.
        ignore_index: the label of terms that do not count.
        n_columns: of the probabilities as they were given.

    Raises:
        DataError: if targets have the wrong shape or dtype, or labels out of range.
    """
    tensor("targets", targets, DataError)
    shape = tuple(p.shape[:-1])
    if n_columns == 1 and tuple(targets.shape) == (*shape, 1):
        targets = targets.squeeze(-1)
    if tuple(targets.shape) != shape:
        raise DataError(
            f"targets must be labels of shape {shape}, one for each distribution, found shape {tuple(targets.shape)}"
        )
    if targets.is_complex() or (targets.is_floating_point() and n_columns > 1):
        raise DataError(f"targets must be integer labels, found dtype {targets.dtype}")
    y = targets.reshape(-1).to(p.device)
    kept = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    y, rows = y[kept], p.reshape(-1, p.shape[-1])[kept]
    wrong = (y < 0) | (y >= p.shape[-1]) | (y != y.long())
    if bool(wrong.any()):
        mend = (
            ""
            if ignore_index is not None
            else "; name the label of targets that do not count by ignore_index"
        )
        raise DataError(
            f"targets must be labels in 0 .. {p.shape[-1] - 1}, found {y[wrong][0].item():g}{mend}"
        )
    return rows, y.long()


def classes(
    probabilities: Float[Tensor, "*N C"],
    targets: Int[Tensor, "*N"],
    ignore_index: int | None,
    *,
    log: bool = False,
) -> tuple[Float[Tensor, "M C"], Int[Tensor, " M"]]:
    """`distributions` with their `labels`, of which there is at least one.

    Raises:
        OutputError: if the probabilities are none.
        DataError: if the targets do not fit, or none of them counts.
    """
    p, y = labels(distributions(probabilities, log=log), targets, ignore_index, probabilities.shape[-1])
    return not_empty(p, "targets that count"), y


def gaussians(
    mean: Float[Tensor, N * C], variance: Tensor, targets: Float[Tensor, N * C]
) -> tuple[Float[Tensor, "N K"], Tensor, Float[Tensor, "N K"]]:
    """Mean, variance ``(N, K)`` or covariance ``(N, K, K)``, and targets in float64, outputs side by side.

    Raises:
        OutputError: if a mean is not finite, a variance not positive and finite, or of another shape.
        DataError: if targets have another shape than the mean, there are none, or they are not finite.
    """
    rows, y = paired(mean, targets)
    k = rows.shape[1]
    spread = tensor("variance", variance, OutputError).double()
    if variance.shape == mean.shape:
        spread = spread.reshape(rows.shape)
    elif tuple(variance.shape) != (*rows.shape, k):
        raise OutputError(
            f"variance must have the shape {tuple(mean.shape)} of the mean, or be covariances {(*rows.shape, k)}, "
            f"found shape {tuple(variance.shape)}"
        )
    positive(spread if spread.ndim == 2 else spread.diagonal(dim1=-2, dim2=-1))
    return rows, spread, y


def positive(variance: Tensor) -> None:
    """Whether variances are.

    Raises:
        OutputError: if one is not positive and finite.
    """
    wrong = ~((variance > 0) & torch.isfinite(variance))
    if bool(wrong.any()):
        raise OutputError(
            f"variances must be positive and finite, found {float(variance[wrong][0]):g}; that of observations "
            "includes their noise, observation_noise=True"
        )


def paired(
    mean: Float[Tensor, N * C], targets: Float[Tensor, N * C]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Means and targets in float64, outputs side by side.

    Raises:
        OutputError: if a mean is not finite.
        DataError: if shapes differ, there are no samples, or a target is not finite.
    """
    tensor("mean", mean, OutputError)
    tensor("targets", targets, DataError)
    if mean.ndim == 0 or mean.shape != targets.shape:
        raise DataError(
            f"targets must have the shape (N, ...) of the mean, {tuple(mean.shape)}, found {tuple(targets.shape)}"
        )
    not_empty(mean, "samples")
    for name, values, error in (("mean", mean, OutputError), ("targets", targets, DataError)):
        if values.is_complex() or not bool(torch.isfinite(values).all()):
            raise error(f"{name} must be real and finite")
    rows = mean.double().reshape(len(mean), -1)
    return rows, targets.to(rows).reshape(rows.shape)


def tensor(name: str, value: object, error: type[ValueError]) -> Tensor:
    """The value itself.

    Raises:
        ValueError: the `error`, if it is no tensor.
    """
    if not isinstance(value, Tensor):
        raise error(f"{name} must be a tensor, found {type(value).__name__}")
    return value


def not_empty(values: Tensor, what: str) -> Tensor:
    """The tensor itself.

    Raises:
        DataError: if it has no rows.
    """
    if values.numel() == 0:
        raise DataError(f"found no {what}, expected at least one")
    return values
