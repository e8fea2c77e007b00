"""Arguments of laplace-torch that have no meaning here, and misspelt ones: refused, with what to write instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from curvlin_nn.errors import UnsupportedError, one_of

_ONE_ENGINE = "one engine serves every layer; leave it out"
_CONVERGES = "leave it out, the search ends where the gradient vanishes"

CONSTRUCTOR = {
    "backend": f"{_ONE_ENGINE}, and name what it computes by curvature='ggn', 'fisher_mc', 'ef' or 'hessian'",
    "backend_kwargs": f"{_ONE_ENGINE}; curvature='fisher_mc' is the stochastic one",
    "asdl_fisher_kwargs": f"{_ONE_ENGINE}; curvature='fisher_mc' is the stochastic one",
    "dict_key_x": "the inputs are all of a batch but its targets; leave it out, and name the targets with dict_key_y",
    "functional_approximation": "hessian_structure='gp' is exact; leave it out",
}
"""What to write instead of arguments of laplace-torch's `Laplace`."""

SEARCH = {
    "n_steps": _CONVERGES,
    "lr": _CONVERGES,
    "init_prior_prec": "leave it out, the search starts at prior_precision and ends at the same place from anywhere",
    "verbose": "the optimum is returned; print it",
}
"""What to write instead of arguments of laplace-torch's `optimize_prior_precision`."""


def refuse(given: Mapping[str, object], function: Callable[..., Any], mends: Mapping[str, str]) -> None:
    """Refuse the keyword arguments that a function does not have.

    Args:
        given: what its ``**`` argument caught.
        function: whose signature has the names that are meant.
        mends: what to write instead of arguments of laplace-torch.

    Raises:
        UnsupportedError: for one that `mends` has.
        TypeError: for any other.
    """
    for name in given:
        if name in mends:
            raise UnsupportedError(f"{name}= is not supported: {mends[name]}")
        known = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        near = difflib.get_close_matches(name, known, n=1)
        expected = f"did you mean {near[0]!r}?" if near else f"expected {one_of(known)}"
        raise TypeError(f"unexpected keyword argument {name!r}; {expected}")
