"""Layer rules: how the use of parameters by one function becomes rows of the Jacobian.

A rule covers one layer family and lives in one file, which registers it. For a layer with output y and a
cotangent g of y, the Jacobian-transpose product of every parameter of the layer is a sum over positions of
outer products: ``left (x) right`` with left made from g and right from the layer's input.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from curvlin_nn.capture.one_hot import OneHot
from curvlin_nn.capture.patches import Patches


class NotCovered(Exception):
    """What a rule's `bind` raises for a call that it does not cover; the message says how the function is called."""


class NotServable(NotCovered):
    """The same for a call that per-sample autodiff cannot serve either.

    Attributes:
        expected: what to do instead.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.expected = expected


@dataclass(frozen=True)
class Call:
    """A recognised call.

    Attributes:
        input: the layer's input.
        roles: the tensors that stand in the parameter roles, ``"weight"`` or ``"bias"``.
        options: what else the rule needs, such as a stride.
        memo: what the rule makes of these and needs again for further columns.
    """

    input: Tensor
    roles: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one parameter, as ``sum over positions of left (x) right``.

    Attributes:
        role: the role of the parameter in the call.
        start: where the part begins within the flattened parameter.
        left: one entry per column and position, ``(V, *positions, out)``.
        right: ``(*positions, in)``; None stands for the number one (``in = 1``).
        transposed: whether the part is flattened as (in, out), as where a weight multiplies from the right, instead of
            as (out, in).
        compact: stands in the place of right where that is unit vectors, or patches of images.
    """

    role: str
    start: int
    left: Float[Tensor, "V *positions out"]
    right: Float[Tensor, "*positions in"] | None
    transposed: bool = False
    compact: OneHot | Patches | None = None

    @property
    def inputs(self) -> int:
        """The length of right; 1 where it stands for the number one."""
        if self.compact is not None:
            return self.compact.size
        return 1 if self.right is None else self.right.shape[-1]

    def without_patches(self) -> Piece:
        """The same with patches written out as vectors."""
        if not isinstance(self.compact, Patches):
            return self
        return replace(self, right=self.compact.written_out, compact=None)


class LayerRule(ABC):
    """One layer family.

    Attributes:
        functions: the torch functions it covers, as `torch.overrides.TorchFunctionMode` sees them.
        batched_columns: whether columns are fastest sent backward all at once (matrix products) or one by
            one.
        is_layer: whether it is a linear map or a convolution, of which the last one is a model's last layer.
    """

    functions: ClassVar[tuple[Callable[..., Any], ...]]
    batched_columns: ClassVar[bool]
    is_layer: ClassVar[bool] = True

    @abstractmethod
    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """The call with its arguments named; takes the arguments of the function.

        Raises:
            NotCovered: if this way to call the function is not covered.
            NotServable: if it is one that nothing can serve.
        """

    def by_position(
        self, call: Call, gradient: Float[Tensor, V * output]
    ) -> Float[Tensor, "V *positions out"]:
        """The gradient with its feature axes last, as one; what stands before are positions.

        The samples are found among these positions; those of the pieces may have further axes behind that one.
        """
        return gradient

    @abstractmethod
    def pieces(self, call: Call, gradient: Float[Tensor, V * output]) -> Iterator[Piece]:
        """The parts of every parameter in a role, from the gradients of the call's output.

        The call's roles may be fewer than those it was bound with.
        """


ENTRY_POINTS = "curvlin.layers"
"""The entry-point group under which other packages offer subclasses of `LayerRule`."""

RULES: dict[Callable[..., Any], LayerRule] = {}
"""The rule of each function; filled by `register`."""


def register(rule: type[LayerRule]) -> type[LayerRule]:
    """Class decorator that enters a layer rule for all its functions."""
    for function in rule.functions:
        if function in RULES:
            raise ValueError(f"a layer rule for {function.__name__} is already registered")
        RULES[function] = rule()
    return rule


def named(**roles: Tensor | None) -> dict[str, Tensor]:
    """The roles that are filled."""
    return {role: tensor for role, tensor in roles.items() if tensor is not None}


@functools.cache
def load_entry_points() -> None:
    """Register the rules of other packages, once, before the first capture.

    A rule that its module has registered as it was imported is left as it is.
    """
    for point in entry_points(group=ENTRY_POINTS):
        rule: type[LayerRule] = point.load()
        if not all(type(RULES.get(function)) is rule for function in rule.functions):
            register(rule)
