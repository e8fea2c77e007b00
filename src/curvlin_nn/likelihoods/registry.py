"""Likelihoods by name."""

from __future__ import annotations

from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood

_FAMILIES: dict[str, type[Likelihood]] = {}


def register(family: type[Likelihood]) -> type[Likelihood]:
    """Class decorator that enters a family under its name."""
    if family.name in _FAMILIES:
        raise ValueError(f"a likelihood named {family.name!r} is already registered")
    _FAMILIES[family.name] = family
    return family


def available() -> list[str]:
    """The registered names."""
    return sorted(_FAMILIES)


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name, or itself.

    Raises:
        UnsupportedError: if no family has that name.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in _FAMILIES:
        raise UnsupportedError(
            f"likelihood {likelihood!r} is not supported; expected {one_of(available())} or a "
            "curvlin_nn.likelihoods.Likelihood"
        )
    return _FAMILIES[likelihood]()
