"""Likelihoods by name."""

from __future__ import annotations

from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.likelihoods.base import Likelihood

_FAMILIES: dict[str, type[Likelihood]] = {}


def register(family: type[Likelihood]) -> type[Likelihood]:
    """Class decorator that enters a family under its name; constructed without arguments, it is the default member."""
    if family.name in _FAMILIES:
        raise ValueError(f"a likelihood named {family.name!r} is already registered")
    _FAMILIES[family.name] = family
    return family


def available() -> list[str]:
    """The registered names."""
    return sorted(_FAMILIES)


def named(name: object) -> Likelihood:
    """The default member of the family of that name.

    Raises:
        UnsupportedError: if there is none.
    """
    if not isinstance(name, str) or name not in _FAMILIES:
        raise UnsupportedError(
            f"likelihood {name!r:.80} is not supported; expected {one_of(available())}, a loss of torch or a "
            "curvlin_nn.likelihoods.Likelihood"
        )
    return _FAMILIES[name]()
