"""The root of an adapted matrix as a `LinearOperator`, for what gpytorch makes of roots: exact, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from curvlin._tree import Structure
from curvlin.covariance import Covariance
from curvlin.interop.adapter import Adapter, flipped, whole_batch
from curvlin.interop.fail_closed import refused
from curvlin.interop.subscripts import coordinates


class RootFactor(Adapter):
    """F with ``F F^T = A``, or its transpose; square, and not triangular.

    Args:
        *tensors: as of the adapter of A.
        spec: likewise.
        transposed: whether it stands for ``F^T``.
    """

    def __init__(self, *tensors: Tensor, spec: Structure, transposed: bool) -> None:
        LinearOperator.__init__(self, *tensors, spec=spec, transposed=transposed)
        self._spec, self._transposed = spec, transposed

    def _rebuilt(self, C: Covariance) -> RootFactor:
        return RootFactor(*whole_batch(C), spec=C._structure(), transposed=self._transposed)

    def _matmul(self, rhs: Tensor) -> Tensor:
        C = self.covariance
        apply: Callable[[Tensor], Tensor] = C.colour
        if self._transposed:  # the transpose of R^-T is R^-1, and that of R is R^T
            apply = C.operator.root_solve if C.inverted else C.operator.whiten
        rhs = rhs.expand(*torch.broadcast_shapes(C.batch_shape, rhs.shape[:-2]), *rhs.shape[-2:])
        return self._broadcast(apply(rhs.movedim(-1, 0)).movedim(0, -1), 2)

    def _transpose_nonbatch(self) -> RootFactor:
        return RootFactor(*self._args, spec=self._spec, transposed=not self._transposed)

    def squared(self) -> Covariance:
        """A, whose root this is.

        Raises:
            InexactPathError: for the transpose, ``F^T F`` being another matrix.
        """
        if self._transposed:
            raise refused(type(self), "squared of a transpose")
        return self._whole()

    def inverse(self) -> RootFactor:
        """``F^-1``: the transpose of the root of ``A^-1``."""
        inverse = flipped(self._whole())
        return RootFactor(*self._args, spec=inverse._structure(), transposed=not self._transposed)

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        return self._matmul(eye)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        rows, columns = (coordinates(i, self.shape[-1], self.device) for i in (row_index, col_index))
        if rows is not None or columns is not None:
            raise refused(type(self), "[...] of rows or columns")
        return RootFactor(
            *(t[batch_indices] for t in self._args), spec=self._spec, transposed=self._transposed
        )
