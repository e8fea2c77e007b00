"""The algebra as plain dicts keyed by pairs of types. Imports nothing, so any operator may look its rule up.

`curvlin.algebra` fills the tables; a third party's operator fills them for itself in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = Callable[..., Any]
RuleT = TypeVar("RuleT", bound=Rule)
Table = dict[tuple[type, type], Rule]

ADD: Table = {}
"""``(type(P), type(Q)) -> rule(P, Q)`` for ``P + Q``; looked up in both orders."""

CONGRUENCE: Table = {}
"""``(type(Phi), type(P)) -> rule(Phi, Psi, P, factors, layout)`` for ``Phi P^-1 Psi^T``."""

TRACE_SOLVE: Table = {}
"""``(type(P), type(Q)) -> rule(P, Q, factors)`` for ``tr(P^-1 Q)``."""

INVERSE: dict[type, Rule] = {}
"""``type(P) -> rule(P)`` for the operator whose entries are those of ``P^-1``."""


def register(table: Table, left: type, right: type) -> Callable[[RuleT], RuleT]:
    """Decorator that enters a rule; entering a second rule for a pair is an error, not an override."""

    def enter(rule: RuleT) -> RuleT:
        if (left, right) in table:
            raise ValueError(f"a rule for ({left.__name__}, {right.__name__}) is already registered")
        table[left, right] = rule
        return rule

    return enter


def register_inverse(operator: type) -> Callable[[RuleT], RuleT]:
    """Decorator that enters a rule into `INVERSE`."""

    def enter(rule: RuleT) -> RuleT:
        if operator in INVERSE:
            raise ValueError(f"an inverse of {operator.__name__} is already registered")
        INVERSE[operator] = rule
        return rule

    return enter


def lookup(table: Table, left: type, right: type) -> Rule | None:
    """The rule for a pair of types; the nearest base class of the left type wins, then of the right type."""
    for base in left.__mro__:
        for other in right.__mro__:
            if (rule := table.get((base, other))) is not None:
                return rule
    return None
