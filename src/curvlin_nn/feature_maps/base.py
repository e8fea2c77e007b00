"""What a feature map is: it linearises a model's outputs, ``f(x; theta) = f(x) + Phi_x theta``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import FeatureOperator
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.feature_maps.recording import FeatureRecording
from curvlin_nn.parameters import ParameterSpace

if TYPE_CHECKING:
    from curvlin_nn.capture import Recording
    from curvlin_nn.feature_maps.jacobian import JacobianMap

COORDINATES = "features"
"""What the coordinates are called where parameters have names."""


class FeatureMap(ABC):
    """``x -> (f, Phi)``.

    A map that stands in for a Jacobian J, ``Phi = J V`` or learned to be like it, says so by `jacobian`: the kernel
    ``Phi Phi^T`` then stands in for ``kappa = J J^T``, and what it leaves out can be given back.

    Attributes:
        orthonormal: whether ``Phi = J V`` with orthonormal columns V, so that ``kappa - Phi Phi^T`` is a kernel too.
    """

    orthonormal: bool = False

    @abstractmethod
    def __call__(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator]:
        """The outputs at x, and the features ``(N, C, K)`` that multiply a deviation of the coordinates."""

    @property
    @abstractmethod
    def size(self) -> int:
        """K, the number of coordinates."""

    @property
    def space(self) -> ParameterSpace:
        """The coordinates by name: the parameters where they are some, one block of K numbers otherwise."""
        return ParameterSpace((COORDINATES,), (torch.Size([self.size]),))

    @property
    def jacobian(self) -> JacobianMap | None:
        """The map that this one stands in for; None if there is none."""
        return None

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Of the outputs of one sample of the last input, in the model's shape; None where the map does not know."""
        return None

    def with_jacobian(self, x: Any) -> tuple[Float[Tensor, "N C"], FeatureOperator, FeatureOperator]:
        """Outputs, features and the Jacobian ``(N, C, P)`` at x; these two in float64, as they are subtracted.

        Raises:
            UnsupportedError: if the map stands in for no Jacobian.
        """
        f, Phi = self(x)
        if self.jacobian is None:
            raise UnsupportedError(
                f"{type(self).__name__} knows no Jacobian that it stands in for, expected one"
            )
        return f, Phi.to(torch.float64), self.jacobian(x)[1].to(torch.float64)

    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "K S"]:
        """``V^T weights``: the coordinates of vectors of weights; for orthonormal maps.

        Raises:
            UnsupportedError: if the map has no such V.
        """
        raise UnsupportedError(f"{type(self).__name__} has no orthonormal columns, expected a map that has")

    def tensors(self) -> Mapping[str, Tensor]:
        """What the features depend on besides the model, by name: whether it changed is asked by its checksums."""
        return {}

    def record(self, x: Any, where: str = "the input") -> Recording | FeatureRecording:
        """Outputs in the model's shape, ready to be asked for rows of features.

        Args:
            x: what the map takes.
            where: what to call this input in error messages.

        Raises:
            OutputError: if outputs or features have the wrong shape, or are not finite.
        """
        return FeatureRecording.checked(*self(x), self.size, where)

    def n_samples(self, x: Any) -> int:
        """N, the number of samples in x."""
        return len(self(x)[0])
