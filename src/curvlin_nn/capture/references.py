"""Telling which parameter a tensor stands for: the parameter itself, some of its rows, or its transpose.

Tensors are told by identity. A view of a parameter is told by its base, and its place in the flattened parameter is
read off its strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """Where a tensor stands in a parameter.

    Attributes:
        name: the name of the parameter.
        start: where it begins within the flattened parameter.
        transposed: whether the flattened parameter holds the transpose of the tensor, a matrix.
    """

    name: str
    start: int = 0
    transposed: bool = False


class References:
    """The tracked parameters, and the views of them.

    Args:
        tracked: the tensors by name, none of them a view.
    """

    def __init__(self, tracked: Mapping[str, Tensor]) -> None:
        self._tracked = {id(tensor): (name, tensor) for name, tensor in tracked.items()}

    def name(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is, or is a view of."""
        found = self._tracked.get(id(tensor))
        if found is None and tensor._is_view():
            found = self._tracked.get(id(tensor._base))
        return None if found is None else found[0]

    def reference(self, tensor: Tensor) -> Reference | None:
        """Where a tensor stands in its parameter; None for a view that is no contiguous part, or transpose of one."""
        if id(tensor) in self._tracked:
            return Reference(self._tracked[id(tensor)][0])
        name, whole = self._tracked[id(tensor._base)]
        start = int(tensor.storage_offset()) - int(whole.storage_offset())
        if (
            not whole.is_contiguous() or tensor.dtype != whole.dtype
        ):  # a view of pairs of numbers as complex ones
            return None
        if tensor.is_contiguous():
            return Reference(name, start)
        if tensor.ndim == 2 and tensor.mT.is_contiguous():
            return Reference(name, start, transposed=True)
        return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor among the arguments or results of a function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
