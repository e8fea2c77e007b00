"""The errors of curvlin: one line that names the argument, what was found, what was expected, and the mend."""

from __future__ import annotations

__all__ = [
    "InexactPathError",
    "NotClosedError",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "StaleFactorError",
]


class NotPositiveDefiniteError(ValueError):
    """An operator whose inverse, determinant or root was asked for is not positive definite.

    Attributes:
        where: which operator or block failed, e.g. ``"KroneckerSum.left"``.
        value: the offending eigenvalue or pivot, in the units of the operator.
        suggested_damping: a damping *relative to the largest eigenvalue* that would mend it, if one is known.
    """

    def __init__(self, where: str, value: float, suggested_damping: float | None = None) -> None:
        self.where = where
        self.value = value
        self.suggested_damping = suggested_damping
        mend = "add Isotropic(delta, size) with delta > 0"
        if suggested_damping is not None:
            mend += f", for example delta = {suggested_damping:.1e} times the largest eigenvalue"
        super().__init__(
            f"{where} is not positive definite: found eigenvalue or pivot {value:.3e}, expected > 0; {mend}"
        )

    def within(self, place: str) -> NotPositiveDefiniteError:
        """The same failure seen from an enclosing operator."""
        return type(self)(f"{place}.{self.where}", self.value, self.suggested_damping)


class NotClosedError(TypeError):
    """No exact structured result exists for the operation; nothing approximate is put in its place."""


class InexactPathError(NotClosedError):
    """Another library asked an adapter for something that it would itself approximate or multiply out."""


class NotConvergedError(RuntimeError):
    """An iterative solve did not reach its tolerance, and its value was asked for all the same."""


class StaleFactorError(RuntimeError):
    """A tensor of a factored operator was changed in place after ``factor()``."""
