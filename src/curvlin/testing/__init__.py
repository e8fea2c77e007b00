"""Tools to test precision operators: laws, matrices that break linear algebra, and the truth to 80 digits.

    from curvlin.testing import LAWS, check_operator, condition_sweep, forbid_dense, make_case, operators

    check_operator(make_my_operator, dense=my_matrix)            # every law, over conditions, sizes and dtypes

    LAWS["solve"](make_case("kronecker_shifted", size=12, log10cond=8.0, seed=3))       # one law, one case
    with forbid_dense(P, x):                                     # fails on any tensor of the size of the matrix
        P.solve(x)

Needs the extra ``testing``; nothing in `curvlin` itself does.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
    import mpmath as _mpmath  # noqa: F401
    import pytest as _pytest  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"curvlin.testing needs the extra 'testing': {error.name} is missing; pip install 'curvlin[testing]'"
    ) from error

from curvlin.testing import laws, strategies
from curvlin.testing.cases import Case, Parameter, Recipe, right_hand_sides
from curvlin.testing.check import Entry, OperatorViolation, Report, assert_exact, check_operator
from curvlin.testing.guard import DenseTensorError, forbid_dense
from curvlin.testing.kinds import KINDS, Draw, Spec, kind, make_case
from curvlin.testing.laws import LAWS, Law, LawViolation, Measurement, law
from curvlin.testing.oracle import Reference, reference
from curvlin.testing.strategies import index_sets, operator_pairs, operators, rhs, spd
from curvlin.testing.suite import operator_suite
from curvlin.testing.sweep import Sweep, SweepRow, condition_sweep

__all__ = [
    "KINDS",
    "LAWS",
    "Case",
    "DenseTensorError",
    "Draw",
    "Entry",
    "Law",
    "LawViolation",
    "Measurement",
    "OperatorViolation",
    "Parameter",
    "Recipe",
    "Reference",
    "Report",
    "Spec",
    "Sweep",
    "SweepRow",
    "assert_exact",
    "check_operator",
    "condition_sweep",
    "forbid_dense",
    "index_sets",
    "kind",
    "law",
    "laws",
    "make_case",
    "operator_pairs",
    "operator_suite",
    "operators",
    "reference",
    "rhs",
    "right_hand_sides",
    "spd",
    "strategies",
]
