"""What an iterative answer is: a value together with how far it may be from the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from curvlin.errors import NotConvergedError

CONVERGED = "converged"
ITERATION_LIMIT = "iteration limit"
STAGNATED = "stagnated"

_REMEDIES = {
    ITERATION_LIMIT: "raise max_iterations, or give a preconditioner close to P",
    STAGNATED: "rounding stops the residual from shrinking further; raise rtol, use float64, or give a preconditioner",
}


@dataclass(frozen=True)
class Solution:
    """The answer of an iterative solve.

    Attributes:
        value: x, differentiable; whatever `converged` says.
        residual: ``|b - P x| / |b|`` of each column, computed from x itself and not carried along; of draws by
            "lanczos", what is left of their change, relative to each draw.
        iterations: how many were made.
        ended: "converged", "iteration limit" or "stagnated" (rounding keeps the residual where it is).
    """

    value: Tensor
    residual: Tensor
    iterations: int
    ended: str

    @property
    def converged(self) -> bool:
        """Whether every column reached the tolerance."""
        return self.ended == CONVERGED

    def require(self) -> Tensor:
        """`value`, if it converged.

        Raises:
            NotConvergedError: if it did not, with the mend.
        """
        if not self.converged:
            raise NotConvergedError(
                f"the solve ended after {self.iterations} iterations ({self.ended}) with a relative residual of "
                f"{float(self.residual.max()):.1e}; {_REMEDIES[self.ended]}"
            )
        return self.value


@dataclass(frozen=True)
class Estimate:
    """A stochastic value and its standard error.

    Attributes:
        value: the mean of the samples.
        standard_error: of `value`, estimated from their spread; 0 where nothing was left to chance. Solves that the
            samples took are as good as their `rtol`.
        degrees_of_freedom: of the standard error.
        products: matrix-vector products that were spent, with the matrix whose trace or diagonal this is.
        truncation: what a deterministic part of the method (the quadrature of `logdet`) may still change the
            value by; 0 where there is none. Not part of `standard_error`.
    """

    value: Tensor
    standard_error: Tensor
    degrees_of_freedom: int
    products: int
    truncation: float = 0.0

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval by Student's t, entry by entry."""
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, found {level}")
        reach = float(student.ppf((1 + level) / 2, self.degrees_of_freedom)) * self.standard_error
        return self.value - reach, self.value + reach

    def plus(self, known: Tensor | float) -> Estimate:
        """The estimate of a sum with something known."""
        return replace(self, value=self.value + known)


@dataclass(frozen=True)
class LowRankApproximation:
    """``P ~ U U^T`` from below: ``P - U U^T`` is positive semidefinite.

    Attributes:
        U: ``(D, rank)``, orthogonal columns of decreasing length.
        residual: an estimate of ``tr(P - U U^T)``, which bounds every norm of the difference.
    """

    U: Float[Tensor, "D rank"]
    residual: Estimate


def estimate(samples: Tensor, products: int, truncation: float = 0.0) -> Estimate:
    """Mean and standard error over the last dimension."""
    n = samples.shape[-1]
    error = samples.std(-1) / n**0.5 if n > 1 else torch.full_like(samples[..., 0], float("inf"))
    return Estimate(samples.mean(-1), error, max(1, n - 1), products, truncation)


def exactly(value: Tensor, products: int) -> Estimate:
    """What nothing was left to chance in."""
    return Estimate(value, torch.zeros_like(value), 1, products)
