"""Diagonal precisions: independent coordinates. Every operation costs O(D)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import floating, positive_integer
from curvlin._tree import static_field, tensor_field
from curvlin.errors import NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator


class _DiagonalHooks(PrecisionOperator):
    """What `Isotropic` and `Diagonal` share: with ``d`` the diagonal, everything is elementwise in d."""

    @abstractmethod
    def _column(self) -> Tensor:
        """d as a column ``(..., D or 1, 1)``."""

    def _factorize(self) -> None:
        d = self._column()
        if not bool((d > 0).all()):
            raise NotPositiveDefiniteError(type(self).__name__, float(d.min()))

    def _matmul(self, X: Tensor) -> Tensor:
        return self._column() * X

    def _solve(self, X: Tensor, factors: None) -> Tensor:
        return X / self._column()

    def _inv_quad(self, X: Tensor, factors: None) -> Tensor:
        return (X.square() / self._column()).sum(-2)

    def _inverse_diagonal(self, factors: None) -> Tensor:
        return 1 / self._diagonal()

    def _whiten(self, X: Tensor, factors: None) -> Tensor:
        return X * self._column().sqrt()

    def _unwhiten(self, Z: Tensor, factors: None) -> Tensor:
        return Z * self._column().rsqrt()

    def _root_matvec(self, Z: Tensor, factors: None) -> Tensor:
        return Z * self._column().sqrt()

    def _root_solve(self, G: Tensor, factors: None) -> Tensor:
        return G * self._column().rsqrt()

    def _to_dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal())


@dataclass(eq=False, repr=False, init=False)
class Isotropic(_DiagonalHooks):
    """``value * I``: the same precision for each of `size` coordinates.

    Args:
        value: a number, a 0-dim tensor, or one value per batch element.
        size: D, the number of coordinates.

    Raises:
        TypeError: if `value` is not floating, or `size` is not an integer.
        ValueError: if `value` is not finite, or `size` is not positive.
    """

    value: Float[Tensor, "*batch"] = tensor_field(0)
    dimension: int = static_field()

    def __init__(self, value: float | Float[Tensor, "*batch"], size: int) -> None:
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        self.value = floating("value", value)
        self.dimension = positive_integer("size", size)

    @property
    def size(self) -> int:
        return self.dimension

    def _column(self) -> Tensor:
        return self.value[..., None, None]

    def _diagonal(self) -> Tensor:
        return self.value[..., None].expand(*self.value.shape, self.size)

    def _logdet(self, factors: None) -> Tensor:
        return self.size * self.value.log()

    def _scale(self, c: Tensor) -> Isotropic:
        return self._with(value=self.value * c)

    def _marginal(self, index: Tensor, max_size: int) -> Isotropic:
        return Isotropic(self.value, len(index))

    def _conditional(self, index: Tensor, max_size: int) -> Isotropic:
        return Isotropic(self.value, len(index))


@dataclass(eq=False, repr=False, init=False)
class Diagonal(_DiagonalHooks):
    """``diag(d)``: independent coordinates with a precision each.

    Args:
        diagonal: d, ``(*batch, D)``.

    Raises:
        TypeError: if d is not a floating tensor.
        ValueError: if d is not finite, or empty.
    """

    values: Float[Tensor, "*batch D"] = tensor_field(1)

    def __init__(self, diagonal: Float[Tensor, "*batch D"]) -> None:
        floating("diagonal", diagonal, ndim=1)
        if diagonal.shape[-1] == 0:
            raise ValueError(f"diagonal must have at least one entry, found shape {tuple(diagonal.shape)}")
        self.values = diagonal

    @property
    def size(self) -> int:
        return self.values.shape[-1]

    def _column(self) -> Tensor:
        return self.values.unsqueeze(-1)

    def _diagonal(self) -> Tensor:
        return self.values

    def _logdet(self, factors: None) -> Tensor:
        return self.values.log().sum(-1)

    def _scale(self, c: Tensor) -> Diagonal:
        return self._with(values=self.values * c[..., None])

    def _marginal(self, index: Tensor, max_size: int) -> Diagonal:
        return Diagonal(self.values[..., index])

    def _conditional(self, index: Tensor, max_size: int) -> Diagonal:
        return Diagonal(self.values[..., index])
