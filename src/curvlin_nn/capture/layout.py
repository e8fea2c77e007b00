"""Where the samples of a batch stand among the positions of a layer's output.

Layers may see samples along axis 0, along another axis, or flattened together with something else (time
steps, patches) with either varying faster. The layout is found by a probe: a cotangent that is non-zero for
one sample must reach that sample's positions and no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples along one axis of the positions.

    Attributes:
        axis: the axis that holds the samples, alone or flattened with something else.
        sample_first: where flattened, whether the sample index varies slowest.
    """

    axis: int
    sample_first: bool

    def fits(self, positions: tuple[int, ...], n_samples: int) -> bool:
        """Whether positions of this shape can hold that many samples in this way."""
        if self.axis >= len(positions) or positions[self.axis] % n_samples:
            return False
        return self.sample_first or positions[self.axis] > n_samples

    def owner(self, positions: tuple[int, ...], n_samples: int) -> Int[Tensor, "*positions"]:
        """The sample that each position belongs to."""
        size = positions[self.axis]
        along = torch.arange(size)
        along = along // (size // n_samples) if self.sample_first else along % n_samples
        return along.reshape(-1, *(1,) * (len(positions) - self.axis - 1)).expand(positions)

    def split(self, tensor: Tensor, n_samples: int, before: int) -> Tensor:
        """``(*before, *positions, last)`` as ``(*before, N, S, last)``, with S positions per sample."""
        if tensor.ndim == before + 1:  # no position but the sample itself
            tensor = tensor.unsqueeze(before)
        axis = before + self.axis
        if self.sample_first:
            unflattened = tensor.unflatten(axis, (n_samples, -1))
        else:
            unflattened = tensor.unflatten(axis, (-1, n_samples)).transpose(axis, axis + 1)
        split: Tensor = unflattened.movedim(axis, before).flatten(before + 1, -2)
        return split


SINGLE = Layout(0, True)
"""One sample owns every position."""


def candidates(positions: tuple[int, ...], n_samples: int) -> list[Layout]:
    """Every layout that positions of this shape allow, the most common first."""
    layouts = [Layout(axis, first) for axis in range(len(positions)) for first in (True, False)]
    return [layout for layout in layouts if layout.fits(positions, n_samples)]
