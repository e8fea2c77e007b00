"""A picture of a surrogate's training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curvlin_nn.errors import NotFittedError
from curvlin_nn.feature_maps import SurrogateMap
from curvlin_nn.plots._canvas import BLUE, DASHED, ORANGE, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def surrogate_training(surrogate_map: SurrogateMap, *, ax: Axes | None = None) -> Axes:
    """The relative error of a surrogate's kernel on held-out samples, over the steps of its training.

    Args:
        surrogate_map: of `SurrogateMap.fit`. Held-out context samples have a line of their own, and so has the least
            error that K features allow on the held-out training samples.
        ax: where to draw.

    Raises:
        NotFittedError: if the map was not trained by `SurrogateMap.fit`.
    """
    history = surrogate_map.history
    if history is None:
        raise NotFittedError(
            "the map has no history: its network was trained elsewhere; use SurrogateMap.fit"
        )
    ax = axes(ax)
    marker = "." if len(history.steps) == 1 else ""
    ax.plot(history.steps, history.errors, marker=marker, color=BLUE, lw=1.8, label="held-out samples")
    if history.context_errors:
        label = "held-out context"
        ax.plot(history.steps, history.context_errors, marker=marker, color=ORANGE, lw=1.2, label=label)
    ax.axhline(history.optimum, label=f"optimum of rank {surrogate_map.size}", **DASHED)
    ax.set(xlabel="step", ylabel="relative error of the kernel", ylim=(0, None))
    ax.legend(frameon=False)
    return ax
