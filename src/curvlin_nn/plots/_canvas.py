"""What every picture is drawn on and with."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvlin_nn._extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#1f5fa8", "#d9601a", "#8a8f98"

DASHED: dict[str, Any] = {"color": GREY, "lw": 1, "ls": "--"}
"""Lines of reference."""


def matplotlib(module: str = "matplotlib") -> ModuleType:
    """Matplotlib or a module of it, imported when a picture is asked for.

    Raises:
        ImportError: without the extra ``plots``.
    """
    return import_extra(module, "plots", "curvlin_nn.plots")


def axes(ax: Axes | None) -> Axes:
    """The Axes to draw on: that of a new figure, unknown to pyplot, where none is given."""
    if ax is None:
        new: Axes = matplotlib("matplotlib.figure").Figure(layout="constrained").subplots()
        return new
    return ax


def array(values: Tensor) -> Any:
    """As NumPy's, from any device."""
    return values.detach().cpu().numpy()
