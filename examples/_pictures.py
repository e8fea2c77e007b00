"""How the pictures of the demo are put together from those of `curvlin_nn.plots`, and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from curvlin_nn import Laplace, plots
from curvlin_nn.metrics import CalibrationBins

FEW = 5  # images in a bin: with fewer its accuracy is noise

mpl.rcParams.update(
    {
        "figure.dpi": 130,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
)


def reliability(path: Path, bins: Mapping[str, CalibrationBins]) -> None:
    """Reliability diagrams side by side, each over the histogram of confidences."""
    figure = Figure(figsize=(4.4 * len(bins), 5.4))
    axes = figure.subplots(2, len(bins), sharex=True, sharey="row", height_ratios=[3, 1], squeeze=False)
    for (name, found), top, bottom in zip(bins.items(), axes[0], axes[1], strict=True):
        plots.reliability_diagram(found, min_count=FEW, ax=top)
        plots.confidence_histogram(found, ax=bottom)
        top.set(title=f"{name}   (ECE {100 * float(found.ece):.1f} %)")
        top.set(ylabel=f"accuracy (bins of {FEW} images or more)")
        bottom.set(ylim=(0, 1), ylabel="share of\ntest images")
    for axis in axes.flat:
        axis.label_outer()
    _save(figure, path)


def entropies(
    path: Path,
    inside: Mapping[str, Tensor],
    outside: Mapping[str, Tensor],
    auroc: Mapping[str, float],
    largest: float,
    outside_name: str,
) -> None:
    """Histograms of the predictive entropy side by side; `largest` is its maximum, log C."""
    figure = Figure(figsize=(4.6 * len(inside), 3.6))
    axes = figure.subplots(1, len(inside), sharey=True, squeeze=False)[0]
    for name, axis in zip(inside, axes, strict=True):
        labels = ("test images", outside_name)
        plots.entropy_histograms(inside[name], outside[name], largest=largest, labels=labels, ax=axis)
        axis.set(title=f"{name}   (AUROC {auroc[name]:.3f})", yscale="log", ylabel="share of images")
        axis.label_outer()
    _one_legend(figure, axes, loc="outside lower center", ncols=2)
    _save(figure, path)


def spectra(path: Path, la: Laplace) -> None:
    """Eigenvalues of every layer's curvature against the prior precision."""
    figure = Figure(figsize=(8.2, 4.2))
    axis = plots.spectrum(la, ax=figure.subplots())
    _one_legend(figure, [axis], title="eigenvalues above the prior", loc="outside right upper")
    _save(figure, path)


@contextmanager
def grid_of_axes(path: Path, rows: int, columns: int) -> Iterator[list[Axes]]:
    """Axes that share their scales, with one legend; saved at the end."""
    figure = Figure(figsize=(4.8 * columns, 2.9 * rows))
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    yield axes
    _one_legend(figure, axes, loc="outside lower center", ncols=5)
    _save(figure, path)


def _one_legend(figure: Figure, axes: Sequence[Axes], **options: Any) -> None:
    """That of the first instead of one for each."""
    for axis in axes:
        axis.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), **options)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
