"""What a law is, and how much error it allows.

Every tolerance follows from one model: an operator answers as if its matrix P had been perturbed by some E
with

    |E| <= C u |P|,     u = eps(storage) (1 + roundings made by the constructor) + D eps(float64),

since results are rounded once to the storage dtype and everything in between is computed in float64. To first
order this moves a solution by ``P^-1 E x``, a quadratic form by ``x^T E x``, a log-determinant by ``tr(P^-1
E)`` and an entry of the inverse by ``y_i^T E y_j`` with ``y_i = P^-1 e_i``: the condition number enters only
where it must. A *residual* may be at most ``|E| |x|`` at any condition number. Products run in the storage
dtype and are allowed ``C D eps(storage) |P| |x|``.

A forward law whose allowed relative error is above `UNCOUNTED` says nothing and is left out. C is `CONSTANT`, for
every law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlin.testing.cases import Case

CONSTANT = 10.0
UNCOUNTED = 1e-2
EPS64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Measurement:
    """One number that a law compares: `observed` must not exceed `allowed`. NaN exceeds everything."""

    quantity: str
    observed: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the observed error is allowed."""
        return self.observed <= self.allowed

    @property
    def ratio(self) -> float:
        """Observed over allowed; above 1 is a violation."""
        if self.allowed > 0:
            return self.observed / self.allowed
        return 0.0 if self.observed == 0 else float("inf")

    def __str__(self) -> str:
        return f"{self.quantity}: observed {self.observed:.2e}, allowed {self.allowed:.2e}"


class LawViolation(AssertionError):
    """A law does not hold for a case."""

    def __init__(self, law: str, case: Case, measurement: Measurement) -> None:
        self.law = law
        self.case = case
        self.measurement = measurement
        super().__init__(f"law {law!r} is violated: {measurement}; {case!r}")


Body = Callable[[Case], Iterator[Measurement]]


@dataclass(frozen=True)
class Law:
    """A law, called with a case; raises `LawViolation` at the first measurement that is too large.

    Attributes:
        number: of the law group, 1 to 18.
        name: how it is asked for.
        body: yields the measurements.
        invertible: whether it needs an inverse, so that singular cases are passed over.
    """

    number: int
    name: str
    body: Body
    invertible: bool

    def __call__(self, case: Case) -> list[Measurement]:
        """The measurements, all of which hold."""
        done = []
        for measurement in self.measure(case):
            if not measurement.holds:
                raise LawViolation(self.name, case, measurement)
            done.append(measurement)
        return done

    def measure(self, case: Case) -> Iterator[Measurement]:
        """The measurements, whether they hold or not."""
        if self.invertible and case.recipe.singular:
            return iter(())
        return self.body(case)

    @property
    def doc(self) -> str:
        """The first line of the law's docstring."""
        return (self.body.__doc__ or "").strip().splitlines()[0]


LAWS: dict[str, Law] = {}
"""Every law by name, in the order of their numbers."""


def law(number: int, *, invertible: bool = True) -> Callable[[Body], Law]:
    """Decorator that makes a generator of measurements a law, named after the function."""

    def enter(body: Body) -> Law:
        name = body.__name__.rstrip("_")
        entered = Law(number, name, body, invertible)
        LAWS[name] = entered
        return entered

    return enter


# -- allowed errors ------------------------------------------------------------------------------------------


def eps(case: Case) -> float:
    """The rounding unit of the storage dtype."""
    return float(torch.finfo(case.dtype).eps)


def backward(case: Case) -> float:
    """``C u``: the perturbation of P, relative to its norm, that is allowed."""
    roundings = eps(case) * (1 + case.recipe.storage_roundings)
    return CONSTANT * (roundings + case.size * EPS64)


def whitened(case: Case) -> float:
    """`backward`, for what goes through coordinates in which an ill-conditioned base is the identity."""
    return backward(case) * (case.condition**0.5 if case.recipe.whitening_costs else 1.0)


def forward(case: Case) -> float:
    """``C u cond``: the largest relative error such a perturbation causes in a solution."""
    return backward(case) * case.condition


def product(case: Case) -> float:
    """``C D eps(storage)``: for products, which run in the storage dtype."""
    return CONSTANT * (case.size * eps(case))


def worst(quantity: str, observed: Tensor, allowed: Tensor | float) -> Measurement:
    """The pair with the largest ratio of two broadcastable tensors (any NaN wins)."""
    seen = observed.detach().double()
    bound = torch.as_tensor(allowed, dtype=torch.float64).detach()
    seen, bound = torch.broadcast_tensors(seen, bound)
    ratio = torch.where(bound > 0, seen / bound, torch.where(seen == 0, 0.0, torch.inf))
    ratio = torch.where(seen.isnan() | bound.isnan(), torch.inf, ratio).flatten()
    at = int(ratio.argmax())
    return Measurement(quantity, float(seen.flatten()[at]), float(bound.flatten()[at]))


def worst_counted(quantity: str, observed: Tensor, allowed: Tensor, size: Tensor) -> Iterator[Measurement]:
    """As `worst`, over the entries whose allowed error is below `UNCOUNTED` of `size`, if there are any."""
    observed, allowed, size = torch.broadcast_tensors(
        observed.double(), allowed.double(), size.double().abs()
    )
    counted = (allowed <= UNCOUNTED * size) | ((size == 0) & (allowed == 0))
    if bool(counted.any()):
        yield worst(quantity, observed[counted], allowed[counted])


UNDERFLOW = 2.0**10
"""Up to how many times the least normal number a sum of D terms may have lost digits to underflow, for D up to that."""


def differing(quantity: str, left: Tensor, right: Tensor) -> Measurement:
    """The number of entries that are not the same bits; none is allowed.

    Entries so small that terms of their sums may have underflowed do not count: there a scale costs digits.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return Measurement(f"{quantity} (shape or dtype)", float("inf"), 0.0)
    same = (left == right) | (left.isnan() & right.isnan())
    if left.is_floating_point():
        same = same | (torch.maximum(left.abs(), right.abs()) < UNDERFLOW * torch.finfo(left.dtype).tiny)
    return Measurement(quantity, float((~same).sum()), 0.0)


def claim(quantity: str, truth: bool) -> Measurement:
    """A statement that is true or not."""
    return Measurement(quantity, 0.0 if truth else 1.0, 0.0)


def norms(X: Tensor) -> Tensor:
    """Euclidean norms of the columns, ``(..., D, K) -> (..., K)``."""
    lengths: Tensor = torch.linalg.vector_norm(X.double(), dim=-2)
    return lengths


def spectral(M: Tensor) -> Tensor:
    """2-norms of (a batch of) matrices; above 100 rows a bound by norms that are much cheaper."""
    M = M.double()
    if M.shape[-1] <= 100:
        value: Tensor = torch.linalg.matrix_norm(M, 2)
        return value
    by_sums = (torch.linalg.matrix_norm(M, 1) * torch.linalg.matrix_norm(M, torch.inf)).sqrt()
    return torch.minimum(torch.linalg.matrix_norm(M), by_sums)
