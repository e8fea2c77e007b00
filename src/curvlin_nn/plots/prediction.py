"""Pictures of predictions: their calibration, their bands, what they say of inputs out of distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn.errors import DataError, OutputError
from curvlin_nn.metrics.calibration import CalibrationBins
from curvlin_nn.plots._canvas import BLUE, DASHED, GREY, ORANGE, array, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS: dict[str, Any] = {"align": "edge", "edgecolor": "white"}


def reliability_diagram(bins: CalibrationBins, *, min_count: int = 1, ax: Axes | None = None) -> Axes:
    """Accuracy against confidence, bin by bin, and the gap between them.

    Args:
        bins: from `metrics.calibration_bins`.
        min_count: bins of fewer predictions are left out: their accuracy is noise.
        ax: where to draw.
    """
    ax = axes(ax)
    used = bins.count >= max(min_count, 1)
    left, width = bins.edges[:-1][used], bins.edges.diff()[used]
    confidence, accuracy = array(bins.confidence[used]), array(bins.accuracy[used])
    ax.plot([0, 1], [0, 1], **DASHED, zorder=3)
    ax.bar(array(left), accuracy, array(width), **_BARS, color=BLUE, alpha=0.8, label="accuracy")
    ax.vlines(
        confidence, accuracy, confidence, color=ORANGE, lw=2.2, zorder=4, label="gap to the stated confidence"
    )
    ax.plot(confidence, confidence, ".", color=ORANGE, ms=7, zorder=4)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    ax.legend(frameon=False, loc="upper left")
    return ax


def confidence_histogram(bins: CalibrationBins, *, ax: Axes | None = None) -> Axes:
    """The share of predictions in each bin of confidence, to stand below a reliability diagram.

    Args:
        bins: from `metrics.calibration_bins`.
        ax: where to draw.
    """
    ax = axes(ax)
    share, width = bins.count / bins.count.sum(), bins.edges.diff()
    ax.bar(array(bins.edges[:-1]), array(share), array(width), **_BARS, color=GREY)
    ax.set(xlim=(0, 1), xlabel="confidence", ylabel="share of predictions")
    return ax


def predictive_band(
    x: Float[Tensor, "*N"],
    mean: Float[Tensor, "*N"],
    variance: Float[Tensor, "*N"],
    noise_variance: float | Float[Tensor, "*N"] | None = None,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    n_deviations: float = 2.0,
    ax: Axes | None = None,
) -> Axes:
    """A curve with standard deviations of the function, and of observations where their noise is given.

    Args:
        x: N inputs of one number each, in any order.
        mean: the prediction there; N numbers.
        variance: of the function; N numbers in any shape, as ``(N, 1, 1)`` from ``la(x)``.
        noise_variance: of an observation given the function.
        data: inputs and targets to draw as points.
        n_deviations: half the width of the bands.
        ax: where to draw.

    Raises:
        OutputError: if the numbers are not as many as the inputs, or a variance is negative.
    """
    ax = axes(ax)
    x, order = x.detach().flatten().sort()
    mean, variance = (
        _of_inputs(name, t, len(x))[order] for name, t in (("mean", mean), ("variance", variance))
    )
    deviations = {"function": variance}
    if noise_variance is not None:
        noise = torch.as_tensor(noise_variance).detach().to(variance)
        noise = (
            noise.expand(len(x)) if noise.numel() == 1 else _of_inputs("noise_variance", noise, len(x))[order]
        )
        deviations = {"with noise": variance + noise, **deviations}
    for name, spread in deviations.items():
        if not bool((spread >= 0).all()):
            raise OutputError(f"variances must not be negative, found {float(spread.min()):g}")
        half = n_deviations * spread.sqrt()
        ax.fill_between(
            array(x),
            array(mean - half),
            array(mean + half),
            color=BLUE,
            alpha=0.35 if name == "function" else 0.15,
            lw=0,
            label=f"{n_deviations:g} s.d. of f" if name == "function" else name,
        )
    ax.plot(array(x), array(mean), color=BLUE, lw=1.8, label="mean")
    if data is not None:
        ax.plot(*(array(t.flatten()) for t in data), ".", color="black", ms=3.5, label="data")
    ax.legend(frameon=False)
    return ax


def entropy_histograms(
    inside: Float[Tensor, "*N"],
    outside: Float[Tensor, "*M"],
    *,
    largest: float | None = None,
    n_bins: int = 25,
    labels: Sequence[str] = ("in distribution", "out of distribution"),
    ax: Axes | None = None,
) -> Axes:
    """Histograms of the predictive entropy in and out of distribution, as shares.

    Args:
        inside: from `metrics.entropy`, in nats.
        outside: likewise, of inputs out of distribution.
        largest: where the last bin ends: log C is the largest that C classes have. None takes the largest found.
        n_bins: how many bins.
        labels: what to call the two.
        ax: where to draw.

    Raises:
        DataError: if there are no entropies on a side.
    """
    ax = axes(ax)
    for name, values in (("inside", inside), ("outside", outside)):
        if values.numel() == 0:
            raise DataError(f"found no entropies {name}, expected at least one")
    top = float(torch.maximum(inside.max(), outside.max())) if largest is None else largest
    edges = array(torch.linspace(0, top or 1.0, n_bins + 1))
    for values, colour, label in zip((inside, outside), (BLUE, ORANGE), labels, strict=True):
        # Entropies computed as largest by rounding lie in the last bin.
        found = array(values.flatten().clamp(max=edges[-1]))
        shares = torch.full((len(found),), 1 / len(found))
        ax.hist(found, edges, weights=array(shares), color=colour, alpha=0.6, label=label)
    ax.set(xlim=(0, edges[-1]), xlabel="predictive entropy (nats)", ylabel="share of inputs")
    ax.legend(frameon=False)
    return ax


def _of_inputs(name: str, values: Tensor, n: int) -> Tensor:
    if values.numel() != n:
        raise OutputError(
            f"{name} must hold a number for each of {n} inputs, found shape {tuple(values.shape)}"
        )
    return values.detach().flatten()
