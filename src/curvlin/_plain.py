"""Trees as plain values: names, numbers, lists and tensors, which any file can hold.

A class is found again among the subclasses of `Tree` that are there, never imported by its name: what a file says runs
no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlin._tree import Structure, Tree, _data_fields, _static_fields
from curvlin.index import IndexSet

PLAIN = (bool, int, float, str, type(None))
"""Static fields that are values of themselves."""


def to_plain(tree: Tree) -> dict[str, Any]:
    """The tree by the name of its class, its fields and the accuracy of its numbers; tensors are not copied.

    Raises:
        TypeError: if a static field is neither a plain value nor an `IndexSet`, or a tuple of such.
    """
    cls = type(tree)
    return {
        "class": _name(cls),
        "fields": [_of_field(getattr(tree, f.name)) for f in _data_fields(cls)],
        "static": [_of_static(getattr(tree, f.name), f"{_name(cls)}.{f.name}") for f in _static_fields(cls)],
        "resolution": tree._structure().resolution,
    }


def from_plain(plain: dict[str, Any]) -> Tree:
    """The inverse of `to_plain`.

    Raises:
        TypeError: if no class has that name; the package that defines it has not been imported.
    """
    cls = next((cls for cls in _subclasses(Tree) if _name(cls) == plain["class"]), None)
    if cls is None:
        raise TypeError(f"no operator {plain['class']!r} is known; import the package that defines it first")
    static = tuple(_to_static(value) for value in plain["static"])
    structure = Structure(cls, static, (), plain["resolution"])
    return cls._make([_to_field(value) for value in plain["fields"]], structure)


def _of_field(value: Any) -> Any:
    if isinstance(value, Tree):
        return to_plain(value)
    return [_of_field(v) for v in value] if isinstance(value, tuple) else value


def _to_field(value: Any) -> Any:
    if isinstance(value, dict):
        return from_plain(value)
    return tuple(_to_field(v) for v in value) if isinstance(value, (list, tuple)) else value


def _of_static(value: Any, where: str) -> Any:
    if isinstance(value, IndexSet):
        return {"sizes": list(value.sizes), "order": torch.cat(value.blocks)}
    if isinstance(value, tuple):
        return [_of_static(v, where) for v in value]
    if not isinstance(value, PLAIN):
        raise TypeError(
            f"{where} must be a number, a string or an IndexSet to be stored, found {value!r:.40}"
        )
    return value


def _to_static(value: Any) -> Any:
    if isinstance(value, dict):
        order: Tensor = value["order"]
        return IndexSet(order.cpu().split(list(value["sizes"])))
    return tuple(_to_static(v) for v in value) if isinstance(value, (list, tuple)) else value


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclasses(cls: type[Tree]) -> Iterator[type[Tree]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
