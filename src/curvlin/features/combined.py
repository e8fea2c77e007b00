"""Linear combinations of the rows of other features, across samples; the rows are left in their own form."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating
from curvlin._tree import tensor_field
from curvlin.errors import NotClosedError
from curvlin.features.base import FeatureOperator


@dataclass(eq=False, repr=False, init=False)
class CombinedFeatures(FeatureOperator):
    """Rows ``sum_j weights_nrj rows_j`` over all M rows of features, sample-major.

    ``S @ Phi`` mixes the rows of one sample, which every structure can do within itself. Combinations across samples
    have no such form: they are kept as the weights beside the rows, and a Gram matrix is ``W (Phi Psi^T) W^T``.

    Args:
        weights: ``(*batch, N, R, M)``.
        rows: features of M rows together.

    Raises:
        TypeError: if `rows` are no features, or of another dtype.
        ValueError: if the shapes do not fit.
    """

    weights: Float[Tensor, "*batch N R M"] = tensor_field(3)
    rows: FeatureOperator = tensor_field(3)

    def __init__(self, weights: Float[Tensor, "*batch N R M"], rows: FeatureOperator) -> None:
        if not isinstance(rows, FeatureOperator):
            raise TypeError(f"rows must be a FeatureOperator, found {type(rows).__name__}")
        floating("weights", weights, ndim=3, like=next(rows._tensors())[0])
        M = rows.n_samples * rows.n_rows
        if weights.shape[-1] != M or 0 in weights.shape[-3:]:
            raise ValueError(
                f"weights must have shape (..., N, R, {M}), one for each row, found {tuple(weights.shape)}"
            )
        broadcastable("weights", weights.shape[:-3], rows.batch_shape)
        self.weights, self.rows = weights, rows

    @property
    def n_samples(self) -> int:
        return self.weights.shape[-3]

    @property
    def n_rows(self) -> int:
        return self.weights.shape[-2]

    @property
    def size(self) -> int:
        return self.rows.size

    def flatten(self) -> CombinedFeatures:
        return CombinedFeatures(self.weights.flatten(-3, -2).unsqueeze(-2), self.rows)

    def to_dense(self) -> Float[Tensor, "*batch N R D"]:
        return self.combined(self.rows.to_dense().flatten(-3, -2))

    def combined(self, values: Float[Tensor, "*batch M K"]) -> Float[Tensor, "*batch N R K"]:
        """Combinations of what belongs to the single rows."""
        products: Tensor = self.weights.flatten(-3, -2).to(values.dtype) @ values
        return products.unflatten(-2, self.weights.shape[-3:-1])

    def _matmul(self, v: Tensor) -> Tensor:
        return self.combined(self.rows._matmul(v).flatten(-3, -2))

    def _rmatmul(self, u: Tensor) -> Tensor:
        spread = self.weights.flatten(-3, -2).mT.to(u.dtype) @ u.flatten(-3, -2)
        return self.rows._rmatmul(spread.unflatten(-2, (self.rows.n_samples, self.rows.n_rows)))

    def _gram(self, Psi: FeatureOperator) -> Tensor | None:
        others = Psi.rows if isinstance(Psi, CombinedFeatures) else Psi
        try:
            K = self.rows.gram(None if others is self.rows else others)
        except NotClosedError:
            return None
        return self.combined_sides(K, Psi)

    def combined_sides(
        self, K: Float[Tensor, "*batch n r m q"], Psi: FeatureOperator
    ) -> Float[Tensor, "*batch N R M Q"]:
        """A product of the rows with those of Psi as one of their combinations; Psi may be a combination, too."""
        left = self.combined(K.flatten(-2).flatten(-3, -2))
        if not isinstance(Psi, CombinedFeatures):
            return left.unflatten(-1, K.shape[-2:])
        both = left @ Psi.weights.flatten(-3, -2).mT.unsqueeze(-3).to(left.dtype)
        return both.unflatten(-1, Psi.weights.shape[-3:-1])

    def _mix(self, S: Tensor) -> CombinedFeatures:
        return CombinedFeatures(S @ self.weights, self.rows)

    def _scale(self, c: Tensor) -> CombinedFeatures:
        return CombinedFeatures(c[..., None, None, None] * self.weights, self.rows)

    def _select(self, samples: slice | Tensor) -> CombinedFeatures:
        return CombinedFeatures(self.weights[..., samples, :, :], self.rows)

    def _columns(self, index: Tensor) -> Tensor:
        return self.combined(self.rows._columns(index).flatten(-3, -2))


def combined_columns(U: Tensor | FeatureOperator, c: Float[Tensor, "*batch k m"]) -> Tensor | FeatureOperator:
    """``U c`` for columns U, or for the features ``U^T``."""
    return CombinedFeatures(c.mT.unsqueeze(-2), U) if isinstance(U, FeatureOperator) else U @ c
