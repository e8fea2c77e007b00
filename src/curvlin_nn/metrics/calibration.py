"""Whether the confidence of a prediction is how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin._check import positive_integer
from curvlin_nn.metrics._check import classes, not_empty
from curvlin_nn.metrics.classification import hits


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Predictions sorted into bins by their confidence, as sums, so that those of two data sets add up.

    Attributes:
        edges: where bins begin and end.
        count: how many predictions are in each.
        confidence_sum: of their confidences.
        hit_sum: how many of them are right.
    """

    edges: Float[Tensor, " B+1"]
    count: Float[Tensor, " B"]
    confidence_sum: Float[Tensor, " B"]
    hit_sum: Float[Tensor, " B"]

    @property
    def confidence(self) -> Float[Tensor, " B"]:
        """The mean confidence in each bin; nan in empty ones."""
        return self.confidence_sum / self.count

    @property
    def accuracy(self) -> Float[Tensor, " B"]:
        """The share of right predictions in each bin; nan in empty ones."""
        return self.hit_sum / self.count

    @property
    def ece(self) -> Float[Tensor, ""]:
        """The expected calibration error, ``sum_b (n_b / n) |accuracy_b - confidence_b|``.

        Raises:
            DataError: if all bins are empty.
        """
        not_empty(self.count[self.count > 0], "predictions")
        return (self.hit_sum - self.confidence_sum).abs().sum() / self.count.sum()

    def __add__(self, other: CalibrationBins) -> CalibrationBins:
        """The bins of both data sets together.

        Raises:
            ValueError: if they are other bins.
        """
        if not torch.equal(self.edges, other.edges):
            raise ValueError(
                "only bins with the same edges add up; take equally wide ones, calibration_bins(adaptive=False)"
            )
        return CalibrationBins(
            self.edges,
            self.count + other.count,
            self.confidence_sum + other.confidence_sum,
            self.hit_sum + other.hit_sum,
        )


def calibration_bins(
    probabilities: Float[Tensor, "*N C"],
    targets: Int[Tensor, "*N"],
    n_bins: int = 15,
    *,
    adaptive: bool = False,
    ignore_index: int | None = None,
) -> CalibrationBins:
    """Predictions by the confidence of the most probable class, for `ece` and reliability diagrams.

    Args:
        probabilities: classes along the last axis; one column holds the probability of a one.
        targets: labels.
        n_bins: how many bins.
        adaptive: bins of equally many predictions instead of equally wide ones.
        ignore_index: the label of targets that do not count.

    Raises:
        OutputError: if the probabilities are out of range or do not sum to one.
        DataError: if the targets are no labels of theirs, or none of them counts.
    """
    p, y = classes(probabilities, targets, ignore_index)
    bins = equal_mass if adaptive else equal_width
    return bins(p.amax(-1), hits(p, y), positive_integer("n_bins", n_bins))


def ece(
    probabilities: Float[Tensor, "*N C"],
    targets: Int[Tensor, "*N"],
    n_bins: int = 15,
    *,
    ignore_index: int | None = None,
) -> Float[Tensor, ""]:
    """The expected calibration error over equally wide bins (Naeini et al., 2015; Guo et al., 2017).

    Bins are ``(b / B, (b + 1) / B]``. `torchmetrics` puts confidences of exactly one, which float32 has, into a bin of
    their own. See `calibration_bins`.
    """
    return calibration_bins(probabilities, targets, n_bins, ignore_index=ignore_index).ece


def adaptive_ece(
    probabilities: Float[Tensor, "*N C"],
    targets: Int[Tensor, "*N"],
    n_bins: int = 15,
    *,
    ignore_index: int | None = None,
) -> Float[Tensor, ""]:
    """The expected calibration error over bins of equally many predictions (Nguyen & O'Connor, 2015).

    See `calibration_bins`.
    """
    return calibration_bins(probabilities, targets, n_bins, adaptive=True, ignore_index=ignore_index).ece


# -- of confidences, already checked; what `evaluate` keeps -----------------------------------------------------------


def equal_width(confidence: Float[Tensor, " M"], hit: Float[Tensor, " M"], n_bins: int) -> CalibrationBins:
    """Bins ``(b / B, (b + 1) / B]``; their sums are one pass over the data."""
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype, device=confidence.device)
    return _summed(edges, torch.bucketize(confidence, edges[1:-1]), confidence, hit)


def equal_mass(confidence: Float[Tensor, " M"], hit: Float[Tensor, " M"], n_bins: int) -> CalibrationBins:
    """Bins of M / B predictions each, give or take one.

    Predictions of equal confidence share their hits evenly, so that the order of the data does not matter where a bin
    ends among them.
    """
    confidence, order = confidence.sort()
    _, tie = torch.unique_consecutive(confidence, return_inverse=True)
    sizes = torch.bincount(tie).to(hit)
    shared = (torch.zeros_like(sizes).index_add(0, tie, hit[order]) / sizes)[tie]
    n_bins = min(n_bins, len(confidence))
    where = torch.arange(len(confidence), device=confidence.device) * n_bins // len(confidence)
    first = torch.cat([where.new_zeros(1), where.diff().nonzero().squeeze(-1) + 1])
    edges = torch.cat([confidence[first], confidence[-1:]])
    return _summed(edges, where, confidence, shared)


def _summed(edges: Tensor, where: Tensor, confidence: Tensor, hit: Tensor) -> CalibrationBins:
    zeros = confidence.new_zeros(len(edges) - 1)
    sums = (zeros.index_add(0, where, values) for values in (torch.ones_like(hit), confidence, hit))
    return CalibrationBins(edges, *sums)
