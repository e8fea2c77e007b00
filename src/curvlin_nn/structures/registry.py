"""Structures by name, those of other packages included."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points

from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.structures.base import Structure, StructureFactory
from curvlin_nn.structures.mixed import Mixed

ENTRY_POINTS = "curvlin.structures"
"""The entry-point group under which other packages offer subclasses of `Structure`, by name."""

StructureChoice = str | StructureFactory | Mapping[str, str | StructureFactory]
"""A name, what makes a state, or either for each pattern of names of parameters or modules."""

_STRUCTURES: dict[str, type[Structure]] = {}


def register(structure: type[Structure]) -> type[Structure]:
    """Class decorator that enters a structure under its name."""
    if structure.name in _STRUCTURES:
        raise ValueError(f"a structure named {structure.name!r} is already registered")
    _STRUCTURES[structure.name] = structure
    return structure


def available() -> list[str]:
    """The names that `resolve` knows."""
    return sorted({*_STRUCTURES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def resolve(structure: StructureChoice) -> StructureFactory:
    """What makes the state of a structure: looked up by name, given, or mixed by layer.

    Args:
        structure: see `StructureChoice`; of patterns the first that matches counts (see `Mixed`).

    Raises:
        UnsupportedError: if no structure has that name.
    """
    if callable(structure):
        return structure
    if isinstance(structure, Mapping) and structure:
        patterns = {pattern: resolve(choice) for pattern, choice in structure.items()}
        return functools.partial(Mixed, patterns=patterns)
    if isinstance(structure, str):
        if structure in _STRUCTURES:
            return _STRUCTURES[structure]
        for point in entry_points(group=ENTRY_POINTS, name=structure):
            loaded: StructureFactory = point.load()
            return loaded
    raise UnsupportedError(
        f"hessian_structure={structure!r} is not supported; expected {one_of(available())} or a "
        "curvlin_nn.structures.Structure class"
    )
