"""A `LinearOperator` that does nothing which it was not taught: the ground on which the adapters stand.

The base class of `linear_operator` answers every question somehow: above 800 rows by conjugate gradients, stochastic
Lanczos quadrature, a Lanczos root of rank 100, or a dense matrix. Here every attribute that a subclass does not define
itself, and that is not proven to be bookkeeping only (`STRUCTURAL`), raises `InexactPathError`; an attribute that a
later version of `linear_operator` adds is refused as well, until someone has looked at it.

Sums and products that `linear_operator` builds around an adapter (``their_operator + ours``) go through the adapter's
`representation` before they solve, factorise or sample anything, and are refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from linear_operator.operators import _linear_operator as upstream
from linear_operator.operators._linear_operator import LinearOperator
from torch import Tensor

from curvlin.errors import InexactPathError
from curvlin.interop.subscripts import resolved

STRUCTURAL = frozenset(
    [
        # shapes, dtypes and the tensors that are held
        *(
            "__dict__",
            "__module__",
            "__weakref__",
            "_args",
            "_check_args",
            "_check_size",
            "_kwargs",
        ),
        *(
            "_permute_batch",
            "_set_requires_grad",
            "_unsqueeze_batch",
            "batch_dim",
            "batch_shape",
            "clone",
            "cpu",
        ),
        *(
            "cuda",
            "detach",
            "detach_",
            "device",
            "dim",
            "double",
            "dtype",
            "expand",
            "float",
            "half",
            "is_square",
        ),
        *("matrix_shape", "mT", "ndim", "ndimension", "numel", "permute", "requires_grad", "requires_grad_"),
        *("reshape", "shape", "size", "squeeze", "T", "t", "transpose", "unsqueeze"),
        # written in terms of what the adapters override, and exact if that is
        *(
            "__matmul__",
            "__mul__",
            "__radd__",
            "__rmatmul__",
            "__rmul__",
            "__truediv__",
            "_approx_diagonal",
            "add",
        ),
        *("add_jitter", "div", "numpy", "rmatmul", "sum"),
    ]
)
"""What is taken from `LinearOperator` as it is; read line by line for linear_operator 0.6."""

_MENDS = {
    "cholesky": "use root_decomposition().root, which multiplies exactly",
    "_cholesky": "use root_decomposition().root, which multiplies exactly",
    "_torch_linalg_svd": "decompose to_dense()",
    "svd": "decompose to_dense()",
    "eigh": "decompose to_dense()",
    "eigvalsh": "decompose to_dense()",
    "diagonalization": "decompose to_dense()",
    "isclose": "compare the operators with P.allclose(Q)",
    "__sub__": "subtract with P.downdate(U), which says whether the result is definite",
    "__rsub__": "subtract with P.downdate(U), which says whether the result is definite",
    "sub": "subtract with P.downdate(U), which says whether the result is definite",
    "cat_rows": "condition a curvlin.Gaussian instead",
    "representation": (
        "convert the whole expression with from_linear_operator, or put the curvlin operator on the left of +"
    ),
    "_sum_batch": "add the operators of the batch with +",
}

_ADDITIONS = (torch.add, torch.Tensor.add)


class FailClosed(LinearOperator):  # type: ignore[misc]
    """Base of the adapters; see the module docstring."""

    __array_ufunc__ = None  # NumPy leaves `array * op` to us instead of making an object array

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is not turned into an array silently; use to_dense().numpy(), or to_scipy() of "
            "the curvlin operator"
        )

    def __getitem__(self, index: Any) -> LinearOperator | Tensor:
        """A part of the matrix; tensors for rows and columns together are pairs of them, as in torch."""
        return super().__getitem__(tuple(resolved(index, self.shape, self.device)))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name for base in cls.__mro__ if base not in LinearOperator.__mro__ for name in vars(base)}
        for name in sorted(set(dir(LinearOperator)) - set(dir(object)) - own - STRUCTURAL):
            is_property = isinstance(getattr(LinearOperator, name), property)
            stub = _refusal(name)
            setattr(cls, name, property(stub) if is_property else stub)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = upstream._HANDLED_FUNCTIONS, upstream._HANDLED_SECOND_ARG_FUNCTIONS
        if not any(func in functions for functions in known):
            raise refused(cls, f"torch.{func.__name__}")
        alpha = (kwargs or {}).get("alpha", 1)
        if func in _ADDITIONS and isinstance(args[0], Tensor) and alpha != 1:
            return (
                args[1].mul(alpha) + args[0]
            )  # upstream swaps the operands, and alpha would scale the tensor
        return super().__torch_function__(func, types, args, kwargs)


def refused(cls: type, name: str) -> InexactPathError:
    """The error for an operation that has no exact structured form here."""
    mend = _MENDS.get(name, "use the curvlin operator itself, or to_dense()")
    return InexactPathError(f"{cls.__name__}.{name} has no exact structured form and is refused; {mend}")


def _refusal(name: str) -> Callable[..., NoReturn]:
    def stub(self: FailClosed, *args: Any, **kwargs: Any) -> NoReturn:
        raise refused(type(self), name)

    stub.__name__ = stub.__qualname__ = name
    stub.__doc__ = "Refused: no exact structured form."
    return stub
