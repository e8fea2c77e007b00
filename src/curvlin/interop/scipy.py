"""Operators and covariances as `scipy.sparse.linalg.LinearOperator`, for SciPy's solvers and eigensolvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

if TYPE_CHECKING:
    from curvlin.covariance import Covariance
    from curvlin.iterative import IterativePrecision
    from curvlin.precision.base import PrecisionOperator


def to_scipy(operator: PrecisionOperator | Covariance | IterativePrecision) -> LinearOperator:
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

    def product(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # SciPy passes whatever dtype and layout its algorithms work in.
        columns: Tensor = torch.as_tensor(np.ascontiguousarray(x)).to(operator.dtype)
        with torch.no_grad():
            result: np.ndarray[Any, Any] = (operator @ columns).numpy()
        return result

    size = operator.shape[-1]
    dtype = np.float32 if operator.dtype == torch.float32 else np.float64
    return LinearOperator(
        shape=(size, size), matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype
    )
