"""What can be stored: tensors and plain values, nested in lists and dicts; in a file, JSON beside named tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlin_nn.errors import UnsupportedError

_TENSOR = "$tensor"


def split(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """The value with the path of each tensor in its place, and the tensors by their paths; tuples become lists.

    Raises:
        UnsupportedError: for anything else, with its path.
    """
    tensors: dict[str, Tensor] = {}
    return _without_tensors(value, "", tensors), tensors


def joined(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split`."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: joined(v, tensors) for key, v in value.items()}
    return [joined(v, tensors) for v in value] if isinstance(value, list) else value


def with_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same value with `function(tensor)` in the place of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: with_tensors(function, v) for key, v in value.items()}
    return [with_tensors(function, v) for v in value] if isinstance(value, (list, tuple)) else value


def equal(first: Any, second: Any) -> bool:
    """Whether two values are the same, tuples and lists being one, wherever their tensors are."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
        while path in tensors:  # only if keys contain what separates them
            path += "'"
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict) and all(isinstance(key, str) and key != _TENSOR for key in value):
        return {
            key: _without_tensors(v, f"{path}.{key}" if path else key, tensors) for key, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    raise UnsupportedError(
        f"{path} is a {type(value).__name__}, which cannot be stored; expected tensors and plain values, in lists and "
        "dicts with names as keys"
    )
