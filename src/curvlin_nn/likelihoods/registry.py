"""Likelihoods by name, those of other packages included."""

from __future__ import annotations

from importlib.metadata import entry_points

from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood

ENTRY_POINTS = "curvlin.likelihoods"
"""The entry-point group under which other packages offer subclasses of `Likelihood`, by name."""

_FAMILIES: dict[str, type[Likelihood]] = {}


def register(family: type[Likelihood]) -> type[Likelihood]:
    """Class decorator that enters a family under its name."""
    if family.name in _FAMILIES:
        raise ValueError(f"a likelihood named {family.name!r} is already registered")
    _FAMILIES[family.name] = family
    return family


def available() -> list[str]:
    """The names that `resolve` knows."""
    return sorted({*_FAMILIES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name, or itself.

    Raises:
        UnsupportedError: if no family has that name.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood in _FAMILIES:
            return _FAMILIES[likelihood]()
        for point in entry_points(group=ENTRY_POINTS, name=likelihood):
            family: type[Likelihood] = point.load()
            return family()
    raise UnsupportedError(
        f"likelihood {likelihood!r} is not supported; expected {one_of(available())} or a "
        "curvlin_nn.likelihoods.Likelihood"
    )
