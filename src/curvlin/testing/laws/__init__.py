"""The 18 groups of laws that an exact precision operator obeys.

    law = LAWS["solve"]
    law(case)              # raises LawViolation with observed and allowed error
    law.measure(case)      # every measurement, whether it holds or not

Constants and tolerances are fixed in one place, `curvlin.testing.laws._law`, and follow the condition number.
"""

from curvlin.testing.laws import (
    conduct,
    divergence,
    gradients,
    inverses,
    parts,
    products,
    roots,
    scale,
)
from curvlin.testing.laws._law import CONSTANT, LAWS, Law, LawViolation, Measurement, law
from curvlin.testing.laws.parts import addition, closed_sum

_in_order = sorted(LAWS.items(), key=lambda item: item[1].number)
LAWS.clear()
LAWS.update(_in_order)

__all__ = [
    "CONSTANT",
    "LAWS",
    "Law",
    "LawViolation",
    "Measurement",
    "addition",
    "closed_sum",
    "conduct",
    "divergence",
    "gradients",
    "inverses",
    "law",
    "parts",
    "products",
    "roots",
    "scale",
]
