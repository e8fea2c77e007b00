"""What an operator of your own is written with: base classes, fields, the tables of the algebra, checks.

    from curvlin.extend import ADD, EigenbasisOperator, register, tensor_field

A new operator derives from `PrecisionOperator` (sixteen hooks, all abstract) or from a class that knows most of them:
`EigenbasisOperator` (an orthogonal eigenbasis known beforehand) or `ImplicitOperator` (values from a factorisation,
derivatives through the product). Its sums, congruences and traces are entered in the tables by `register`; a pair
that is not entered raises `NotClosedError`, which is a correct answer. The tutorial *A new operator* writes one.
"""

from curvlin._check import (
    broadcastable,
    floating,
    pair_of_sizes,
    positive_integer,
    same_kind,
    square,
    symmetric,
)
from curvlin._tables import ADD, CONGRUENCE, TRACE_SOLVE, lookup, register
from curvlin._tree import is_concrete, needs_grad, static_field, tensor_field
from curvlin.algebra.congruence import by_rows
from curvlin.algebra.traces import trace_solve
from curvlin.errors import NotClosedError, NotPositiveDefiniteError
from curvlin.features.base import FeatureOperator
from curvlin.numerics.implicit import graft
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.eigenbasis import EigenbasisOperator
from curvlin.precision.implicit import ImplicitLogdetOperator, ImplicitOperator

__all__ = [
    "ADD",
    "CONGRUENCE",
    "TRACE_SOLVE",
    "EigenbasisOperator",
    "FeatureOperator",
    "ImplicitLogdetOperator",
    "ImplicitOperator",
    "NotClosedError",
    "NotPositiveDefiniteError",
    "PrecisionOperator",
    "broadcastable",
    "by_rows",
    "floating",
    "graft",
    "is_concrete",
    "lookup",
    "needs_grad",
    "pair_of_sizes",
    "positive_integer",
    "register",
    "same_kind",
    "square",
    "static_field",
    "symmetric",
    "tensor_field",
    "trace_solve",
]
