"""Mean and covariance of draws that come some at a time."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


class RunningMoments:
    """Moments of draws along axis 0, of vectors along the last axis (Chan, Golub & LeVeque, 1983).

    Args:
        diagonal: whether only variances are wanted.
    """

    def __init__(self, *, diagonal: bool = False) -> None:
        self._diagonal = diagonal
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, draws: Float[Tensor, "S *batch D"]) -> None:
        """Draws more."""
        n, mean = len(draws), draws.mean(0)
        deviations = draws - mean
        scatter = self._square(deviations.movedim(0, -1))
        if self._mean is None or self._scatter is None:
            self._count, self._mean, self._scatter = n, mean, scatter
            return
        total, gap = self._count + n, mean - self._mean
        self._scatter = self._scatter + scatter + (self._count * n / total) * self._square(gap.unsqueeze(-1))
        self._mean = self._mean + (n / total) * gap
        self._count = total

    @property
    def mean(self) -> Float[Tensor, "*batch D"]:
        """Their mean."""
        assert self._mean is not None
        return self._mean

    def spread(self) -> Float[Tensor, "*batch D D"] | Float[Tensor, "*batch D"]:
        """Their unbiased covariance, or variance."""
        assert self._scatter is not None
        return self._scatter / (self._count - 1)

    def _square(self, X: Float[Tensor, "*batch D S"]) -> Tensor:
        return X.square().sum(-1) if self._diagonal else X @ X.mT
