"""What `subset_of_weights` and the arguments that go with it say together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.subnetwork import SubnetMask
from curvlin_nn.subnetwork_space import Subnetwork


@dataclass(frozen=True)
class Subset:
    """A choice of weights.

    Attributes:
        name: what it is called: ``"subnetwork"`` for a mask.
        selection: what is chosen.
    """

    name: Selection
    selection: Selection | Subnetwork

    @classmethod
    def of(
        cls,
        model: nn.Module,
        subset_of_weights: Selection | SubnetMask | None,
        subnetwork_indices: Any = None,
        last_layer_name: str | None = None,
    ) -> Subset:
        """The choice that the arguments of `Laplace` make.

        Raises:
            UnsupportedError: if they contradict each other, or choose nothing.
        """
        if isinstance(subset_of_weights, SubnetMask):
            if subnetwork_indices is not None or last_layer_name is not None:
                other = "last_layer_name" if subnetwork_indices is None else "subnetwork_indices"
                raise UnsupportedError(
                    f"subset_of_weights is a mask and {other} is given too, expected one of them"
                )
            return cls("subnetwork", Subnetwork.of(model, subset_of_weights.indices))
        name: Selection = "last_layer" if subset_of_weights is None else subset_of_weights
        for argument, value, goes_with in (
            ("subnetwork_indices", subnetwork_indices, "subnetwork"),
            ("last_layer_name", last_layer_name, "last_layer"),
        ):
            if value is not None and not _is(name, goes_with):
                raise UnsupportedError(
                    f"{argument} goes with subset_of_weights={goes_with!r}, found {name!r}; leave one of the two out"
                )
        if _is(name, "subnetwork"):
            return cls(name, Subnetwork.of(model, subnetwork_indices))
        if last_layer_name is not None:
            if last_layer_name not in dict(model.named_modules()):
                raise UnsupportedError(
                    f"last_layer_name={last_layer_name!r} is no module of the model, expected one of "
                    "model.named_modules()"
                )
            return cls(name, [last_layer_name])
        if not _is(name, "last_layer"):
            ParameterSpace.of(model, name)  # say now what is wrong with it
        return cls(name, name)


def _is(selection: Selection, name: str) -> bool:
    return isinstance(selection, str) and selection == name
