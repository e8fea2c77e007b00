"""The pytest plugin: a function or class marked ``operator_suite`` becomes one test for each law and dtype.

Loaded by every pytest run of an environment that holds curvlin, so it imports nothing until it meets the marker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

MARKER = "operator_suite"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(make_op=None, dense=None, laws='all', **options): one test for each law and dtype, by "
        "curvlin.testing.check_operator; on a function, that function makes the operator",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> list[pytest.Item | pytest.Collector] | None:
    """A marked function becomes its tests; a marked class gets them beside its own."""
    marks = [mark for mark in _own_marks(obj) if mark.name == MARKER]
    if not marks:
        return None
    if isinstance(obj, type):
        if MARKER not in vars(obj):  # once, however often the class is collected
            setattr(obj, MARKER, True)
            for test, check in _tests(_options(marks, None, obj)).items():
                setattr(obj, f"test_{test}", staticmethod(check))
        return [pytest.Class.from_parent(collector, name=name, obj=obj)]
    others = [mark for mark in _own_marks(obj) if mark.name != MARKER]
    items: list[pytest.Item | pytest.Collector] = []
    for test, check in _tests(_options(marks, obj, obj)).items():
        check.pytestmark = others  # type: ignore[attr-defined]  # pytest's own place for marks
        items.append(pytest.Function.from_parent(collector, name=f"{name}[{test}]", callobj=check))
    return items


def _own_marks(obj: object) -> list[pytest.Mark]:
    """The marks of an object itself, not those of a base class."""
    marks = getattr(obj, "__dict__", {}).get("pytestmark", [])
    return list(marks) if isinstance(marks, list) else [marks]


def _options(marks: list[pytest.Mark], function: object | None, marked: object) -> dict[str, Any]:
    from curvlin.precision.base import PrecisionOperator
    from curvlin.testing.check import check_operator

    where = f"operator_suite on {getattr(marked, '__name__', marked)}"
    if isinstance(marked, type) and issubclass(marked, PrecisionOperator):
        raise pytest.UsageError(
            f"{where}: mark the function that makes the operator, or a test class with make_op=, not the operator"
        )
    options: dict[str, Any] = {}
    for mark in marks:
        options |= inspect.signature(check_operator).bind_partial(*mark.args, **mark.kwargs).arguments
    if function is not None and "make_op" in options:
        raise pytest.UsageError(f"{where}: leave make_op out, the marked function makes the operator")
    options.setdefault("make_op", function)
    if options["make_op"] is None:
        raise pytest.UsageError(f"{where}: a class needs make_op=, the function that makes the operator")
    return options


def _tests(options: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """One function without arguments for each law and dtype."""
    from curvlin.testing.check import DTYPES, OperatorViolation, check_operator, named_laws

    laws = named_laws(options.pop("laws", "all"))
    dtypes = options.pop("dtypes", DTYPES)

    def test(law: str, dtype: Any) -> Callable[[], None]:
        def check() -> None:
            try:
                check_operator(laws=law, dtypes=[dtype], **options)
            except OperatorViolation as violation:
                pytest.fail(str(violation), pytrace=False)

        return check

    return {
        f"{law.name}-{str(dtype).removeprefix('torch.')}": test(law.name, dtype)
        for law in laws
        for dtype in dtypes
    }
