"""What a feature map is: it linearises a model's outputs, ``f(x; theta) = f(x) + Phi_x theta``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvlin import FeatureOperator


class FeatureMap(ABC):
    """``x -> (f, Phi)``."""

    @abstractmethod
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """The outputs at x, and the features ``(N, C, D)`` that multiply a deviation of the coordinates."""

    def n_samples(self, x: Any) -> int:
        """N, the number of samples in x."""
        return len(self(x)[0])
