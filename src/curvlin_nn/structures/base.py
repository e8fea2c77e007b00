"""What a curvature structure is: it reduces a stream of captures to a precision operator.

States are sums over data, never means, so that states of disjoint data merge; in float64 whatever the model's
dtype, so that zero eigenvalues stay below any prior precision in use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace

SelfT = TypeVar("SelfT", bound="Structure")


class Structure(ABC):
    """The running state of one structure over one space of parameters.

    Attributes:
        name: the name it is registered under.
        passes: how many times it needs to see the data.
        restricts: whether the structure of some coordinates alone needs nothing but their rows.
        takes_output_curvature: whether the first pass takes captures that hold `Captures.output_curvature` in the place
            of columns.
    """

    name: ClassVar[str]
    passes: int = 1
    restricts: bool = False
    takes_output_curvature: bool = False

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space

    def begin(self, pass_index: int) -> None:  # noqa: B027 - structures of one pass have nothing to prepare
        """Called before pass `pass_index` over the data, counted from zero."""

    @abstractmethod
    def update(self, captures: Captures) -> None:
        """Add one batch."""

    def check_merge(self: SelfT, other: SelfT) -> None:  # noqa: B027 - most structures merge always
        """Whether `merge` would add `other`; asked of all states that merge together before the first of them does.

        Raises:
            UnsupportedError: if it would refuse.
        """

    @abstractmethod
    def merge(self: SelfT, other: SelfT) -> None:
        """Add the state of other data, over the same parameters.

        Raises:
            UnsupportedError: where `check_merge` does, with both states as they were.
        """

    @abstractmethod
    def finish(self) -> PrecisionOperator:
        """The curvature of everything seen, over the flat parameters, float64; the state stays as it is."""

    def state_dict(self) -> dict[str, Any]:
        """What the state holds of the data, at any time, the middle of a pass included.

        Returns:
            Tensors and plain values (numbers, strings, None), in lists and dicts with names as keys. Tensors need not
            be copied. What the constructor is given is not part of it.

        Raises:
            UnsupportedError: unless the structure says what it holds.
        """
        raise UnsupportedError(
            f"structure {type(self).__name__} cannot be stored, expected methods state_dict and load_state_dict; "
            "define them, as docs/reference/extend.md shows"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what another state held; asked of one that was made with the same options and has seen nothing.

        Args:
            state: what `state_dict` gave, tuples as lists; tensors are this state's own, on the device of the model.
        """
        raise UnsupportedError(
            f"structure {type(self).__name__} cannot be stored, expected methods state_dict and load_state_dict; "
            "define them, as docs/reference/extend.md shows"
        )


StructureFactory = Callable[[ParameterSpace], Structure]
"""What makes the state of a structure over a space of parameters."""
