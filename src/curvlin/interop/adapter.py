"""What the adapters of a matrix and of its root share: tensors that each have the whole batch, and how to read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin._tree import Structure, build
from curvlin.covariance import Covariance
from curvlin.errors import InexactPathError
from curvlin.interop.fail_closed import FailClosed, refused

MAX_DENSE = 2048
"""Rows up to which an adapter becomes a dense matrix, because `linear_operator` asks for one unasked."""


class Adapter(FailClosed):
    """What the matrix and its root have in common: the tensors, each with the whole batch, and how to read them.

    Args:
        *tensors: of the `Covariance` that is stood for, in pytree order.
        spec: what is left of it without them.
    """

    def __init__(self, *tensors: Tensor, spec: Structure) -> None:
        super().__init__(*tensors, spec=spec)
        self._spec = spec

    def _whole(self) -> Covariance:
        result: Covariance = build(self._spec, self._args)
        return result

    @property
    def covariance(self) -> Covariance:
        """The matrix as a `Covariance` on the tensors held here; a batch that only repeats it is left out."""
        whole = self._whole()
        repeated = min(_repeated(t, t.ndim - own) for t, own in whole._tensors())
        return whole._map(lambda t, _: t[(0,) * repeated]) if repeated else whole

    def _rebuilt(self, C: Covariance) -> Any:
        return type(self).of(C)

    @classmethod
    def of(cls, C: Covariance) -> Any:
        """The adapter of a covariance."""
        return cls(*whole_batch(C), spec=C._structure())

    def _size(self) -> torch.Size:
        return self._whole().shape

    def evaluate_kernel(self) -> Any:
        """Itself: nothing is lazy here."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `Tensor.to`, with what `PrecisionOperator.to` checks."""
        return self._rebuilt(self._whole().to(*args, **kwargs))

    def type(self, dtype: torch.dtype) -> Any:
        """As `to`."""
        return self.to(dtype=dtype)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> Any:
        return self._rebuilt(self._whole().expand(torch.Size(batch_shape)))

    def repeat(self, *sizes: Any) -> Any:
        """Copies along batch dimensions, as views wherever one operator is repeated."""
        counts = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if len(counts) < self.dim() or tuple(counts[-2:]) != (1, 1):
            raise ValueError(
                f"sizes must be one count for each of {self.dim()} dimensions and end in (1, 1), found {counts}"
            )
        batch = (1,) * (len(counts) - self.dim()) + tuple(self.batch_shape)

        def repeated(t: Tensor, own: int) -> Tensor:
            t = t.reshape(*batch, *t.shape[t.ndim - own :])
            if all(1 in pair for pair in zip(batch, counts[:-2], strict=True)):
                return t.expand(
                    *(b * c for b, c in zip(batch, counts[:-2], strict=True)), *t.shape[len(batch) :]
                )
            return t.repeat(*counts[:-2], *(1,) * own)

        return self._rebuilt(self._whole()._map(repeated))

    def matmul(self, other: Tensor) -> Tensor:
        """The product with a tensor; 1-D is a vector."""
        if not isinstance(other, Tensor):
            raise refused(type(self), f"matmul with a {type(other).__name__}")
        if other.ndim == 1:
            product: Tensor = self._matmul(other.unsqueeze(-1)).squeeze(-1)
            return product
        return self._matmul(other)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self._transpose_nonbatch().matmul(rhs)
        return product

    def to_dense(self, max_size: int = MAX_DENSE) -> Tensor:
        """The matrix.

        Args:
            max_size: the most rows for which it is made, because much of `linear_operator` calls this unasked.

        Raises:
            InexactPathError: if there are more.
        """
        size = self.shape[-1]
        if size > max_size:
            raise InexactPathError(
                f"{type(self).__name__}.to_dense of {size} rows exceeds max_size={max_size}; use to_dense(max_size) "
                "or covariance.to_dense() if that is meant"
            )
        return self._dense()

    def _broadcast(self, value: Tensor, own: int) -> Tensor:
        """A result with the whole batch, repeated dimensions included."""
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[: value.ndim - own])
        return value.expand(*batch, *value.shape[value.ndim - own :])


def flipped(C: Covariance) -> Covariance:
    """The matrix ``C^-1``, held by the same operator."""
    return Covariance(C.operator, inverted=not C.inverted)


def whole_batch(C: Covariance) -> list[Tensor]:
    """The tensors of C, each with the whole batch."""
    batch = C.batch_shape
    return [
        # A tensor that has the batch already stays the one it is, so that `requires_grad_` reaches it.
        t if t.shape[: t.ndim - own] == batch else t.expand(*batch, *t.shape[t.ndim - own :])
        for t, own in C._tensors()
    ]


def _repeated(t: Tensor, n_batch: int) -> int:
    """How many leading batch dimensions hold one element, or views of one."""
    count = 0
    while count < n_batch and (t.shape[count] == 1 or (t.stride(count) == 0 and t.shape[count] > 0)):
        count += 1
    return count
