"""The marker that turns a function or class of a pytest module into a suite of laws."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from curvlin.testing.check import check_operator
from curvlin.testing.maker import Dense, MakeOperator


def operator_suite(
    make_op: MakeOperator | None = None, dense: Dense = None, **options: Any
) -> pytest.MarkDecorator:
    """``@pytest.mark.operator_suite`` with its arguments checked: one test for each law and dtype.

        @operator_suite(dense=lambda P: torch.diag(P.d))      # on a function, which makes the operator
        def my_operator(size, log10cond, generator): ...

        @operator_suite(my_operator, dense=..., laws=["solve", "gradients"])
        class TestMyOperator: ...                             # on a class, beside its own tests

    The plugin that reads it is installed with curvlin.

    Args:
        make_op: as for `check_operator`; left out on a function.
        dense: likewise.
        **options: the other arguments of `check_operator`.

    Raises:
        TypeError: for an argument that `check_operator` does not have.
    """
    given: dict[str, Any] = {"dense": dense, **options}
    if make_op is not None:
        given["make_op"] = make_op
    inspect.signature(check_operator).bind_partial(**given)
    return pytest.mark.operator_suite.with_args(**given)
