"""Operators and covariances as `scipy.sparse.linalg.LinearOperator`, for SciPy's solvers and eigensolvers, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal

if TYPE_CHECKING:
    from curvlin.covariance import Covariance
    from curvlin.iterative import IterativePrecision

Array = np.ndarray[Any, Any]


class ScipyOperator(LinearOperator):  # type: ignore[misc]
    """The product of a `curvlin` operator, in SciPy's shape; `operator` is what it multiplies with."""

    def __init__(self, operator: PrecisionOperator | Covariance | IterativePrecision) -> None:
        self.operator = operator
        dtype = np.float32 if operator.dtype == torch.float32 else np.float64
        super().__init__(dtype=dtype, shape=(operator.size, operator.size))

    def _matmat(self, X: Array) -> Array:
        if X.dtype.kind not in "biufc":
            raise TypeError(
                f"the right-hand side must hold numbers, found dtype {X.dtype}; convert it with .astype"
            )
        if X.dtype.kind == "c":
            return self._matmat(X.real) + 1j * self._matmat(X.imag)
        # SciPy passes whatever dtype and layout its algorithms work in.
        columns: Tensor = torch.as_tensor(np.ascontiguousarray(X)).to(self.operator.dtype)
        with torch.no_grad():
            result: Array = (self.operator @ columns).numpy()
        return result

    _matvec = _matmat

    def _adjoint(self) -> ScipyOperator:
        return self

    _transpose = _adjoint


def to_scipy(operator: PrecisionOperator | Covariance | IterativePrecision) -> ScipyOperator:
    """A SciPy operator of the same product, without copying what `operator` holds.

    As SciPy's preconditioner M of a system in P, pass ``P.factor().inverse()`` so that P is factorised once.

    Args:
        operator: on the CPU and without batch dimensions; its gradients do not follow.

    Raises:
        ValueError: if it is batched or on another device.
        TypeError: if NumPy has no such dtype.
    """
    if len(operator.batch_shape) > 0:
        raise ValueError(
            f"to_scipy takes one operator, found a batch of shape {tuple(operator.batch_shape)}; pick one"
        )
    if operator.device.type != "cpu":
        raise ValueError(
            f"to_scipy needs an operator on the CPU, found {operator.device}; move it with .to('cpu')"
        )
    if operator.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"to_scipy needs float32 or float64, found {operator.dtype}; convert it with .float()"
        )
    return ScipyOperator(operator)


def from_scipy(matrix: Any, *, max_size: int = 2048) -> PrecisionOperator | Covariance | IterativePrecision:
    """A matrix of NumPy or SciPy whose structure is one of ours, with its numbers copied.

    =====================================  ==========================================================
    a matrix that is an ndarray            `Dense`
    sparse, main diagonal only             `Diagonal`
    sparse, coordinates fall into groups   `BlockDiag` with a `Dense` block for each group, and one
    that do not touch                      `Diagonal` block for those that touch nothing
    made by `to_scipy`                     what it was made from
    =====================================  ==========================================================

    Stored zeros count as entries: which coordinates touch is decided by the pattern, not by values.

    Args:
        matrix: symmetric, float32 or float64.
        max_size: the most rows of a block that is made dense.

    Raises:
        NotClosedError: for any other structure, one connected sparse matrix for example.
        TypeError: if it is no matrix, or has another dtype.
        ValueError: if it is not symmetric, not square or not finite.
    """
    if isinstance(matrix, ScipyOperator):
        return matrix.operator
    if isinstance(matrix, LinearOperator):
        raise _refused("a LinearOperator whose entries are not known")
    if not (isinstance(matrix, np.ndarray) or sparse.issparse(matrix)):
        raise TypeError(
            f"matrix must be an ndarray, a sparse matrix or a SciPy LinearOperator, found {type(matrix).__name__}"
        )
    if matrix.dtype not in (np.float32, np.float64):
        raise TypeError(f"matrix must be float32 or float64, found {matrix.dtype}; convert it with .astype")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, found shape {matrix.shape}")
    if isinstance(matrix, np.ndarray):
        return Dense(_tensor(matrix))
    return _from_sparse(sparse.csr_array(matrix, copy=True), max_size)


def _from_sparse(matrix: Any, max_size: int) -> PrecisionOperator:
    matrix.sum_duplicates()
    size = matrix.shape[0]
    entries = matrix.tocoo()
    if (entries.row == entries.col).all():
        return Diagonal(_tensor(matrix.diagonal()))
    # The pattern as ones: connected_components takes a stored zero for no edge.
    pattern = sparse.csr_array((np.ones(matrix.nnz), matrix.indices, matrix.indptr), shape=matrix.shape)
    n_groups, group = sparse.csgraph.connected_components(pattern, directed=False)
    if n_groups == 1:
        raise _refused(f"a sparse matrix whose {size} rows are all connected")
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(group))[:-1])
    largest = max(len(g) for g in groups)
    if largest > max_size:
        raise _refused(f"a sparse matrix with a block of {largest} rows, more than max_size={max_size}")
    alone = np.sort(np.concatenate([g for g in groups if len(g) == 1] or [np.empty(0, dtype=np.int64)]))
    coupled = [g for g in groups if len(g) > 1]
    blocks: list[PrecisionOperator] = [Dense(_tensor(matrix[g][:, g].toarray())) for g in coupled]
    if len(alone) > 0:
        blocks.append(Diagonal(_tensor(matrix.diagonal()[alone])))
        coupled.append(alone)
    return BlockDiag(blocks, [torch.from_numpy(g) for g in coupled])


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def _refused(found: str) -> NotClosedError:
    return NotClosedError(
        f"no operator of ours has the structure of this matrix: found {found}; use "
        "curvlin.IterativePrecision(matrix), or from_scipy(matrix.toarray()) if D^2 entries are affordable"
    )
