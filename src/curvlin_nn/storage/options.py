"""How a posterior was made, as plain values: likelihoods and structures by name and options, operators by their fields.

What no name stands for (a function, a class that is not registered) is given again when it is loaded; in its place
stands what it was called, so that two of different names are told apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvlin._plain import from_plain, to_plain
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import StorageError, UnsupportedError
from curvlin_nn.likelihoods import Likelihood, registry
from curvlin_nn.structures import Mixed, StructureChoice, StructureFactory
from curvlin_nn.structures import resolve as resolve_structure

_GIVEN, _GENERATOR, _DTYPE = "$given", "$generator", "$dtype"

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def of_likelihood(likelihood: Likelihood) -> dict[str, Any]:
    """By the name of its family and its options."""
    options = likelihood.options()
    try:
        known = registry.family(likelihood.name) is type(likelihood)
    except UnsupportedError:
        known = False
    if options is None or not known:
        return {_GIVEN: type(likelihood).__name__}
    return {"name": likelihood.name, "options": options}


def to_likelihood(stored: Mapping[str, Any], given: Any = None) -> Any:
    """The likelihood, or the one that is given in its place.

    Raises:
        StorageError: if one must be given and is not.
    """
    if given is None:
        _check_not_given("likelihood", stored)
        return registry.family(stored["name"])(**stored["options"])
    return given


def of_structure(factory: StructureFactory) -> dict[str, Any]:
    """By its name and options, pattern by pattern for several."""
    options: dict[str, Any] = {}
    made_by: Any = factory
    if isinstance(factory, functools.partial) and not factory.args:  # one of another is one
        options, made_by = factory.keywords, factory.func
    if made_by is Mixed:
        return {"patterns": [[p, of_structure(choice)] for p, choice in options["patterns"].items()]}
    name = getattr(made_by, "name", None)
    try:
        known = isinstance(name, str) and resolve_structure(name) is made_by
    except UnsupportedError:
        known = False
    if not known or not all(map(_is_option, options.values())):
        return {_GIVEN: getattr(made_by, "__name__", type(made_by).__name__)}
    return {"name": name, "options": {key: _of_option(value) for key, value in options.items()}}


def to_structure(stored: Mapping[str, Any], given: StructureChoice | None = None) -> StructureChoice:
    """The choice of structures, or the one that is given in its place.

    Raises:
        StorageError: if one must be given and is not.
    """
    if given is not None:
        return given
    if "patterns" in stored:
        return {pattern: _factory(choice) for pattern, choice in stored["patterns"]}
    return _factory(stored)


def of_prior(precision: Tensor | PrecisionOperator) -> Any:
    """Numbers as they are, an operator by its fields.

    Raises:
        UnsupportedError: for an operator that holds more than tensors and plain values.
    """
    if isinstance(precision, Tensor):
        return precision.detach()
    try:
        return to_plain(precision.detach())
    except TypeError as error:
        raise UnsupportedError(f"prior_precision cannot be stored: {error}") from error


def to_prior(stored: Any, device: torch.device) -> Tensor | PrecisionOperator:
    """The inverse of `of_prior`, an operator on this device.

    Raises:
        StorageError: for an operator of a package that has not been imported.
    """
    if isinstance(stored, Tensor):
        return stored
    try:
        operator = from_plain(stored)
    except TypeError as error:
        raise StorageError(f"prior_precision cannot be loaded: {error}") from error
    assert isinstance(operator, PrecisionOperator)
    return operator.to(device)


def of_generator(generator: torch.Generator | None) -> Any:
    """By its device and state."""
    return None if generator is None else {_GENERATOR: str(generator.device), "state": generator.get_state()}


def to_generator(stored: Any) -> torch.Generator | None:
    """A generator in the state that was stored.

    Raises:
        StorageError: if it was on a device that this machine does not have.
    """
    if stored is None:
        return None
    try:
        return torch.Generator(stored[_GENERATOR]).set_state(stored["state"].cpu())
    except RuntimeError as error:
        raise StorageError(
            f"a generator on {stored[_GENERATOR]!r} cannot be made here; load it on a machine that has the device"
        ) from error


def without_randomness(stored: Any) -> Any:
    """The same options with the states of generators left out: what is compared with others."""
    if isinstance(stored, dict):
        return None if _GENERATOR in stored else {k: without_randomness(v) for k, v in stored.items()}
    return [without_randomness(v) for v in stored] if isinstance(stored, (list, tuple)) else stored


def _factory(stored: Mapping[str, Any]) -> StructureFactory:
    _check_not_given("hessian_structure", stored)
    options = {key: _to_option(value) for key, value in stored["options"].items()}
    factory = resolve_structure(stored["name"])
    return functools.partial(factory, **options) if options else factory


def _is_option(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None), Tensor, torch.dtype, torch.Generator))


def _of_option(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return of_generator(value)
    return {_DTYPE: str(value)} if isinstance(value, torch.dtype) else value


def _to_option(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _DTYPES[value[_DTYPE]] if _DTYPE in value else to_generator(value)
    return value


def _check_not_given(argument: str, stored: Mapping[str, Any]) -> None:
    if _GIVEN in stored:
        raise StorageError(
            f"{argument} was a {stored[_GIVEN]} of no registered name and cannot be loaded; give it again with "
            f"load(..., {argument}=...)"
        )
