"""The pictures of the demo, one function each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.floating]
FEW = 5  # images in a bin: with fewer its accuracy is noise
BLUE, ORANGE, GREY = "#1f5fa8", "#d9601a", "#8a8f98"

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


def reliability(
    path: Path, probabilities: Mapping[str, Array], labels: Array, ece: Mapping[str, float], n_bins: int = 15
) -> None:
    """Accuracy against confidence, bin by bin, over the histogram of confidences."""
    figure = Figure(figsize=(4.4 * len(probabilities), 5.4))
    axes = figure.subplots(
        2, len(probabilities), sharex=True, sharey="row", height_ratios=[3, 1], squeeze=False
    )
    for (name, p), top, bottom in zip(probabilities.items(), axes[0], axes[1], strict=True):
        confidence, hit = p.max(1), p.argmax(1) == labels
        where = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
        used, count = np.unique(where, return_counts=True)
        bars = {"width": 1 / n_bins, "align": "edge", "edgecolor": "white"}
        bottom.bar(used / n_bins, count / len(hit), color=GREY, **bars)
        used = used[count >= FEW]
        accuracy = np.array([hit[where == b].mean() for b in used])
        stated = np.array([confidence[where == b].mean() for b in used])
        top.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", zorder=3)
        top.bar(used / n_bins, accuracy, color=BLUE, alpha=0.8, label="accuracy", **bars)
        top.vlines(
            stated, accuracy, stated, color=ORANGE, lw=2.2, zorder=4, label="gap to the stated confidence"
        )
        top.plot(stated, stated, ".", color=ORANGE, ms=7, zorder=4)
        top.set(title=f"{name}   (ECE {100 * ece[name]:.1f} %)", xlim=(0, 1), ylim=(0, 1.02))
        bottom.set(xlabel="confidence", ylim=(0, 1))
    axes[0, 0].set_ylabel(f"accuracy (bins of {FEW} images or more)")
    axes[1, 0].set_ylabel("share of\ntest images")
    axes[0, 0].legend(loc="upper left")
    _save(figure, path)


def entropies(
    path: Path,
    inside: Mapping[str, Array],
    outside: Mapping[str, Array],
    auroc: Mapping[str, float],
    largest: float,
    outside_name: str,
) -> None:
    """Histograms of the predictive entropy, in and out of distribution; `largest` is its maximum, log C."""
    bins = np.linspace(0, largest, 26)
    figure = Figure(figsize=(4.6 * len(inside), 3.6))
    axes = figure.subplots(1, len(inside), sharey=True, squeeze=False)[0]
    for name, axis in zip(inside, axes, strict=True):
        for values, colour, label in (
            (inside[name], BLUE, "test images"),
            (outside[name], ORANGE, outside_name),
        ):
            weights = np.full(len(values), 1 / len(values))
            axis.hist(values, bins, weights=weights, color=colour, alpha=0.6, label=label)
        axis.set(title=f"{name}   (AUROC {auroc[name]:.3f})", xlabel="predictive entropy (nats)")
        axis.set(yscale="log", xlim=(0, largest))
    axes[0].set_ylabel("share of images")
    _legend_below(figure, axes[0], columns=2)
    _save(figure, path)


def spectra(path: Path, eigenvalues: Mapping[str, Array], prior_precision: float) -> None:
    """Eigenvalues of every layer's curvature, largest first, against the prior precision."""
    figure = Figure(figsize=(8.2, 4.2))
    axis = figure.subplots()
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(eigenvalues)))
    floor = prior_precision * 1e-6
    for (name, values), colour in zip(eigenvalues.items(), colours, strict=True):
        ordered = np.sort(values)[::-1]
        rank = np.arange(1, len(ordered) + 1) / len(ordered)
        above = int((ordered > prior_precision).sum())
        seen = ordered > floor
        label = f"{name}: {above} of {len(ordered)}"
        axis.plot(rank[seen], ordered[seen], color=colour, lw=1.8, label=label)
    axis.axhline(prior_precision, color=ORANGE, lw=1.2, ls="--")
    axis.annotate(
        f"prior precision {prior_precision:.2g}",
        xy=(1, prior_precision),
        xytext=(-4, 4),
        textcoords="offset points",
        color=ORANGE,
        ha="right",
    )
    axis.set(xlabel="rank of the eigenvalue / size of the block", ylabel="eigenvalue of the curvature")
    axis.set(yscale="log", xlim=(0, 1))
    figure.legend(
        *axis.get_legend_handles_labels(), title="eigenvalues above the prior", loc="outside right upper"
    )
    _save(figure, path)


def band(
    axis: Axes, x: Array, mean: Array, inner: Array, outer: Array, data: tuple[Array, Array], truth: Array
) -> None:
    """A regression curve with two standard deviations of the function and of the observations."""
    axis.fill_between(x, mean - 2 * outer, mean + 2 * outer, color=BLUE, alpha=0.15, lw=0, label="with noise")
    axis.fill_between(
        x, mean - 2 * inner, mean + 2 * inner, color=BLUE, alpha=0.35, lw=0, label="2 s.d. of f"
    )
    axis.plot(x, truth, color=GREY, lw=1.2, ls="--", label="truth")
    axis.plot(x, mean, color=BLUE, lw=1.8, label="mean")
    axis.plot(*data, ".", color="black", ms=3.5, label="data")


@contextmanager
def grid_of_axes(path: Path, rows: int, columns: int) -> Iterator[list[Axes]]:
    """Axes that share their scales, with one legend; saved at the end."""
    figure = Figure(figsize=(4.8 * columns, 2.9 * rows))
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    yield axes
    _legend_below(figure, axes[0], columns=5)
    _save(figure, path)


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
