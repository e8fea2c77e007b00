"""Likelihoods by name, those of other packages included."""

from __future__ import annotations

from importlib.metadata import entry_points

from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood

ENTRY_POINTS = "curvlin.likelihoods"
"""The entry-point group under which other packages offer subclasses of `Likelihood`, by name."""

_FAMILIES: dict[str, type[Likelihood]] = {}


def register(family: type[Likelihood]) -> type[Likelihood]:
    """Class decorator that enters a family under its name; constructed without arguments, it is the default member."""
    if family.name in _FAMILIES:
        raise ValueError(f"a likelihood named {family.name!r} is already registered")
    _FAMILIES[family.name] = family
    return family


def available() -> list[str]:
    """The names that `resolve` knows."""
    return sorted({*_FAMILIES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def named(name: object) -> Likelihood:
    """The default member of the family of that name.

    Raises:
        UnsupportedError: if there is none.
    """
    return family(name)()


def family(name: object) -> type[Likelihood]:
    """The family of that name.

    Raises:
        UnsupportedError: if there is none.
    """
    if isinstance(name, str):
        if name in _FAMILIES:
            return _FAMILIES[name]
        for point in entry_points(group=ENTRY_POINTS, name=name):
            loaded: type[Likelihood] = point.load()
            return loaded
    raise UnsupportedError(
        f"likelihood {name!r:.80} is not supported; expected {one_of(available())}, a loss of torch or a "
        "curvlin_nn.likelihoods.Likelihood"
    )
