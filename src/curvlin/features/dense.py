"""Features without structure: the rows themselves, every product a product of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import floating
from curvlin._tree import tensor_field
from curvlin.features.base import FeatureOperator


@dataclass(eq=False, repr=False, init=False)
class DenseFeatures(FeatureOperator):
    """Rows of features as a tensor.

    Args:
        matrix: ``(*batch, N, R, D)``: N samples of R rows of D features.

    Raises:
        TypeError: if it is not a floating tensor.
        ValueError: if it has fewer than three dimensions, none of some kind of row, or is not finite.
    """

    matrix: Float[Tensor, "*batch N R D"] = tensor_field(3)

    def __init__(self, matrix: Float[Tensor, "*batch N R D"]) -> None:
        floating("matrix", matrix, ndim=3)
        if 0 in matrix.shape[-3:]:
            raise ValueError(
                f"matrix must have at least one sample, one row and one feature, found shape {tuple(matrix.shape)}"
            )
        self.matrix = matrix

    @property
    def n_samples(self) -> int:
        return self.matrix.shape[-3]

    @property
    def n_rows(self) -> int:
        return self.matrix.shape[-2]

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    def flatten(self) -> DenseFeatures:
        return DenseFeatures(self.matrix.flatten(-3, -2).unsqueeze(-2))

    def to_dense(self) -> Float[Tensor, "*batch N R D"]:
        return self.matrix

    def _matmul(self, v: Tensor) -> Tensor:
        products = self.matrix.flatten(-3, -2) @ v
        return products.reshape(*products.shape[:-2], *self.matrix.shape[-3:-1], v.shape[-1])

    def _rmatmul(self, u: Tensor) -> Tensor:
        return self.matrix.flatten(-3, -2).mT @ u.flatten(-3, -2)

    def _gram(self, Psi: FeatureOperator) -> Tensor:
        # Any kind multiplies a tensor of columns, so dense rows combine with every structure.
        products = Psi._matmul(self.matrix.flatten(-3, -2).mT)
        return products.reshape(*products.shape[:-1], *self.matrix.shape[-3:-1]).movedim((-4, -3), (-2, -1))

    def _mix(self, S: Tensor) -> DenseFeatures:
        return DenseFeatures(S @ self.matrix)

    def _scale(self, c: Tensor) -> DenseFeatures:
        return DenseFeatures(c[..., None, None, None] * self.matrix)

    def _select(self, samples: slice | Tensor) -> DenseFeatures:
        return DenseFeatures(self.matrix[..., samples, :, :])

    def _columns(self, index: Tensor) -> Tensor:
        return torch.index_select(self.matrix, -1, index)
