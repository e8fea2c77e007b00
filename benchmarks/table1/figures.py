"""Pictures of the results: entropies in and out of distribution, and likelihood against detection."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from table1.report import Result, over_seeds, score

COLOURS = {"test": "#4c72b0", "kmnist": "#dd8452", "mnist": "#937860"}
LABELS = {"test": "Fashion-MNIST", "kmnist": "KMNIST", "mnist": "MNIST"}


def draw(rows: dict[str, list[Result]], folder: Path, stem: str) -> list[Path]:
    """All pictures as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for kind in ("entropy", "Gaussian entropy"):
        shown = {name: found[0]["histograms"].get(kind) for name, found in rows.items()}
        path = folder / f"{stem}-{kind.lower().replace(' ', '-')}.png"
        if _entropies({name: h for name, h in shown.items() if h}, kind, path):
            drawn.append(path)
    path = folder / f"{stem}-tradeoff.png"
    _tradeoff(rows, path)
    return [*drawn, path]


def _entropies(shown: dict[str, Any], kind: str, path: Path) -> bool:
    """Small multiples, one for each row."""
    if not shown:
        return False
    from matplotlib import pyplot as plt

    n_columns = min(4, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    figure, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(max(4.5, 2.6 * n_columns), 0.6 + 1.7 * n_rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (name, histogram) in zip(axes.flat, shown.items(), strict=False):
        edges = histogram["edges"]
        for part, counts in histogram["counts"].items():
            width, total = edges[1] - edges[0], sum(counts)
            density = [count / total / width for count in counts]
            axis.stairs(density, edges, color=COLOURS[part], label=LABELS[part], linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        if kind == "entropy":
            axis.set_yscale("log")
            axis.set_yticks([])
            axis.minorticks_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel(f"{kind}, nats", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _tradeoff(rows: dict[str, list[Result]], path: Path) -> None:
    """The gain in likelihood against detection by entropy, with standard errors over seeds."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    markers = itertools.cycle("osD^vPX")  # more rows than colours are told apart by
    for name, found in rows.items():
        x, y = (
            over_seeds(found, value)
            for value in (score("AUC kmnist"), lambda result: result["NLL minus MAP"]["mean"])
        )
        assert x is not None and y is not None
        marker = next(markers)
        axis.errorbar(x.mean, y.mean, y.error, x.error, marker, markersize=5, linewidth=1, label=name)
    axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.margins(0.1)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    axis.set_xlabel("AUC of the predictive entropy, KMNIST")
    axis.set_ylabel("NLL minus that of MAP")
    figure.savefig(path, dpi=110)
    plt.close(figure)
