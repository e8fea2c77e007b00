"""Parts of an adapted matrix: single entries, and rectangles that no structure survives in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin.errors import InexactPathError
from curvlin.index import identity_columns
from curvlin.interop.fail_closed import FailClosed
from curvlin.interop.subscripts import from_the_front

MAX_SIZE = 2048
"""Columns of a matrix up to which they are multiplied out, as in `PrecisionOperator.marginal`."""


class Rectangle(FailClosed):
    """Rows and columns of an adapted matrix, as the numbers they are: it multiplies and can be cut further.

    Anything that treats it as a covariance is refused, because it need not be symmetric; a principal part
    ``op[..., index, index]`` with slices, or ``op.covariance.marginal(index)``, is one.
    """

    def __init__(self, entries: Tensor) -> None:
        super().__init__(entries)

    def _size(self) -> torch.Size:
        return self.to_dense().shape

    def to_dense(self) -> Tensor:
        """The entries."""
        entries: Tensor = self._args[0]
        return entries

    def evaluate_kernel(self) -> Rectangle:
        """Itself: nothing is lazy here."""
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.to_dense() @ rhs

    def matmul(self, other: Tensor) -> Tensor:
        """The product with a tensor."""
        return self._matmul(other)

    def _transpose_nonbatch(self) -> Rectangle:
        return Rectangle(self.to_dense().mT)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> Rectangle:
        return Rectangle(self.to_dense().expand(*batch_shape, *self.shape[-2:]))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Rectangle:
        picked = self.to_dense()[batch_indices] if batch_indices else self.to_dense()
        return Rectangle(picked[..., row_index, :][..., col_index])

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        return self.to_dense()[(*batch_indices, row_index, col_index)]


def is_principal(rows: Tensor | None, columns: Tensor | None) -> bool:
    """Whether rows and columns are the same coordinates, each once."""
    if rows is None or columns is None or not torch.equal(rows, columns):
        return False
    return rows.unique().numel() == len(rows)


def rectangle(op: Any, rows: Tensor | None, columns: Tensor | None) -> Rectangle:
    """``A[rows, columns]``, from as many products as its shorter side has entries."""
    everything = torch.arange(op.shape[-1], device=op.device)
    rows, columns = (everything if index is None else index for index in (rows, columns))
    if len(rows) < len(columns):
        return Rectangle(_columns(op, rows)[..., columns, :].mT)
    return Rectangle(_columns(op, columns)[..., rows, :])


def entries_at(op: Any, rows: Tensor, columns: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Single entries ``A[*batch, rows, columns]``, indices broadcast against each other."""
    rows, columns = (from_the_front(i, op.shape[-1]) for i in (rows, columns))
    rows, columns, *batch_indices = torch.broadcast_tensors(rows, columns, *batch)
    if torch.equal(rows, columns):
        diagonal: Tensor = op.diagonal()
        return diagonal[(*batch_indices, rows)]
    needed, position = columns.unique(return_inverse=True)
    return _columns(op, needed)[(*batch_indices, rows, position)]


def _columns(op: Any, index: Tensor) -> Tensor:
    """``A[:, index]`` as a product with columns of the identity."""
    if index.numel() > MAX_SIZE:
        raise InexactPathError(
            f"{type(op).__name__}[...] of {index.numel()} rows or columns is a dense part, and the most is {MAX_SIZE}; "
            "choose the same rows and columns, or multiply with the columns that are needed"
        )
    columns: Tensor = op.matmul(identity_columns(index, op.shape[-1], op.dtype))
    return columns
