"""A subnetwork: some coordinates of a model's parameters, all others held fixed (Daxberger et al., 2021).

The posterior over the chosen coordinates has the principal submatrix of the curvature that belongs to them. What is
said of these coordinates alone (prior, evidence, posterior) is said over `Subnetwork.space`, in which each parameter
has as many entries as were chosen of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlin.index import as_index
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class Subnetwork:
    """Chosen coordinates of a flat vector of parameters.

    Attributes:
        whole: the parameters that the coordinates are counted in.
        indices: the chosen coordinates, increasing.
    """

    whole: ParameterSpace
    indices: Int[Tensor, " k"]

    @classmethod
    def of(cls, model: nn.Module, indices: Any) -> Subnetwork:
        """Coordinates of the parameters that require a gradient, as `parameters_to_vector` puts them side by side.

        Args:
            model: any module.
            indices: distinct integers, in any order.

        Raises:
            UnsupportedError: if they are no such integers, or out of range.
        """
        whole = ParameterSpace.of(model, "all")
        if indices is None:
            raise UnsupportedError(
                "subset_of_weights='subnetwork' needs subnetwork_indices, found None; give a LongTensor, or for "
                "subset_of_weights a mask of curvlin_nn.subnetwork"
            )
        try:
            found = as_index(indices, whole.size, torch.device("cpu"))
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"subnetwork_indices{str(error).removeprefix('index')}") from None
        return cls(whole, found.sort().values)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Subnetwork)
            and self.whole == other.whole
            and torch.equal(self.indices, other.indices)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no value to be hashed by

    @cached_property
    def touched(self) -> ParameterSpace:
        """The parameters that a chosen coordinate lies in, whole."""
        shapes = dict(zip(self.whole.names, self.whole.shapes, strict=True))
        names = tuple(name for name, chosen in self._chosen.items() if chosen.any())
        return ParameterSpace(names, tuple(shapes[name] for name in names))

    @cached_property
    def index(self) -> Int[Tensor, " k"]:
        """The chosen coordinates as they are counted in `touched`."""
        return torch.cat([self._chosen[name] for name in self.touched.names]).nonzero().squeeze(1)

    @cached_property
    def space(self) -> ParameterSpace:
        """The chosen coordinates side by side, as one vector for each parameter."""
        sizes = [int(self._chosen[name].sum()) for name in self.touched.names]
        return ParameterSpace(self.touched.names, tuple(torch.Size([size]) for size in sizes))

    def of_whole(self, whole: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch k"]:
        """The chosen coordinates of a flat vector of all parameters."""
        return whole[..., self.indices.to(whole.device)]

    def fill(
        self, whole: Float[Tensor, " P"], values: Float[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch P"]:
        """The flat vector of all parameters with other values at the chosen coordinates."""
        filled = whole.expand(*values.shape[:-1], len(whole)).clone()
        filled[..., self.indices.to(whole.device)] = values
        return filled

    @cached_property
    def _chosen(self) -> dict[str, Tensor]:
        """Which entries of each parameter are chosen."""
        mask = torch.zeros(self.whole.size, dtype=torch.bool)
        mask[self.indices] = True
        return {name: mask[span.start : span.stop] for name, span in self.whole.spans.items()}
