"""What a matvec-only operator multiplies with: functions, matrices, exact operators, features, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlin._check import floating, positive_integer, same_kind
from curvlin._tree import build
from curvlin.errors import NotClosedError
from curvlin.features.base import FeatureOperator
from curvlin.precision.base import PrecisionOperator

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Term:
    """One summand: its product and, where it is known, a root L with ``L L^T`` equal to it.

    Attributes:
        multiply: ``(X, *tensors) -> P X`` for X of shape ``(D, K)``.
        tensors: what derivatives are taken with respect to.
        size: D.
        colour: ``(Z, *tensors) -> L Z`` for Z of shape ``(noise, K)``.
        noise: the number of columns of L.
        live: whether `multiply` has derivatives in `tensors`.
    """

    multiply: Function
    tensors: tuple[Tensor, ...]
    like: Tensor
    size: int
    colour: Function | None = None
    noise: int = 0

    def scaled(self, c: Tensor) -> Term:
        """``c`` times this term."""
        colour = self.colour

        def multiply(X: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
            return c * self.multiply(X, *tensors)

        def coloured(Z: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
            assert colour is not None
            return c.sqrt() * colour(Z, *tensors)

        return Term(
            multiply,
            (c, *self.tensors),
            self.like,
            self.size,
            None if colour is None else coloured,
            self.noise,
        )


def of_operator(P: PrecisionOperator) -> Term:
    """An exact operator; its root serves for samples."""
    _unbatched("source", P)
    structure = P._structure()

    def multiply(X: Tensor, *tensors: Tensor) -> Tensor:
        product: Tensor = build(structure, tensors)._matmul(X)
        return product

    def colour(Z: Tensor, *tensors: Tensor) -> Tensor:
        draws: Tensor = build(structure, tensors).root_matvec(Z.mT).mT
        return draws

    tensors = tuple(t for t, _ in P._tensors())
    return Term(multiply, tensors, tensors[0].detach(), P.size, colour, P.size)


def of_features(Phi: FeatureOperator) -> Term:
    """``Phi^T Phi``, summed over samples and rows."""
    _unbatched("source", Phi)
    structure = Phi._structure()

    def multiply(X: Tensor, *tensors: Tensor) -> Tensor:
        rows = build(structure, tensors)
        product: Tensor = rows._rmatmul(rows._matmul(X))
        return product

    def colour(Z: Tensor, *tensors: Tensor) -> Tensor:
        draws: Tensor = build(structure, tensors)._rmatmul(Z.unflatten(0, (Phi.n_samples, Phi.n_rows)))
        return draws

    tensors = tuple(t for t, _ in Phi._tensors())
    return Term(multiply, tensors, tensors[0].detach(), Phi.size, colour, Phi.n_samples * Phi.n_rows)


def of_matrix(matrix: Tensor) -> Term:
    """A symmetric matrix, dense or sparse; a sparse one has no derivatives."""
    if matrix.layout == torch.strided:
        floating("source", matrix, ndim=2)
    elif not matrix.is_floating_point():
        raise TypeError(f"source must have a floating dtype, found {matrix.dtype}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"source must be one square matrix, found shape {tuple(matrix.shape)}")
    if matrix.layout != torch.strided and matrix.requires_grad:
        raise TypeError(
            "a sparse source that requires grad is not supported; pass a function (X, values) -> P X and "
            "parameters=(values,)"
        )
    like = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
    if matrix.layout == torch.strided:
        return Term(lambda X, A: A @ X, (matrix,), like, len(matrix))
    return Term(lambda X: matrix @ X, (), like, len(matrix))


def of_function(
    function: Function,
    parameters: Sequence[Tensor],
    size: int | None,
    like: Tensor | None,
    root: Function | None,
    root_size: int | None,
) -> Term:
    """A function ``(X, *parameters) -> P X`` of the caller's."""
    if size is None:
        raise TypeError("size must be given with a function, found None; it is D, the number of rows")
    size = positive_integer("size", size)
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}] must be a torch.Tensor, found {type(parameter).__name__}")
    if like is None:
        floats = [t for t in parameters if t.is_floating_point()]
        like = (floats[0].detach() if floats else torch.empty(0)).new_empty(0)
    expected = like

    def multiply(X: Tensor, *tensors: Tensor) -> Tensor:
        product = function(X, *tensors)
        if not isinstance(product, Tensor) or product.shape != X.shape or product.dtype != X.dtype:
            found = (
                f"{product.dtype} of shape {tuple(product.shape)}"
                if isinstance(product, Tensor)
                else type(product).__name__
            )
            raise ValueError(
                f"the product of {X.dtype} of shape {tuple(X.shape)} must be like it, found {found}"
            )
        return product

    noise = size if root_size is None else positive_integer("root_size", root_size)
    term = Term(multiply, tuple(parameters), expected, size, root, noise)
    _refuse_hidden_parameters(term)
    return term


def terms_of(
    source: Any,
    parameters: Sequence[Tensor],
    size: int | None,
    like: Tensor | None,
    root: Function | None,
    root_size: int | None,
) -> tuple[Term, ...]:
    """The summands of whatever was given."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("source must have at least one term, found an empty list")
        return tuple(
            term for part in source for term in terms_of(part, parameters, size, like, root, root_size)
        )
    if isinstance(source, PrecisionOperator):
        return (of_operator(source),)
    if isinstance(source, FeatureOperator):
        return (of_features(source),)
    if isinstance(source, Tensor):
        return (of_matrix(source),)
    if _is_scipy_sparse(source):
        coo = source.tocoo()
        entries = torch.sparse_coo_tensor(
            torch.stack([torch.from_numpy(coo.row).long(), torch.from_numpy(coo.col).long()]),
            torch.from_numpy(coo.data),
            coo.shape,
            check_invariants=True,
        )
        return (of_matrix(entries.coalesce()),)
    if callable(source):
        return (of_function(source, parameters, size, like, root, root_size),)
    raise TypeError(
        "source must be a function, a matrix, a precision or feature operator, or a list of them, found "
        f"{type(source).__name__}"
    )


def fit_each_other(terms: Sequence[Term]) -> None:
    """Refuse terms of different sizes, dtypes or devices."""
    for term in terms[1:]:
        if term.size != terms[0].size:
            raise ValueError(f"all terms must have {terms[0].size} rows, found {term.size}")
        same_kind("every term", term.like, terms[0].like)


def _refuse_hidden_parameters(term: Term) -> None:
    """A function may not close over what needs a gradient: it would be lost without a word."""
    X = torch.zeros(term.size, 1, dtype=term.like.dtype, device=term.like.device)
    with torch.enable_grad():
        product = term.multiply(X, *(t.detach() for t in term.tensors))
    if product.requires_grad:
        raise ValueError(
            "the function closes over tensors that require grad; pass them as parameters=(...), or detach them"
        )


def _unbatched(name: str, operator: PrecisionOperator | FeatureOperator) -> None:
    if len(operator.batch_shape) > 0:
        raise NotClosedError(
            f"{name} must be one operator, found a batch of shape {tuple(operator.batch_shape)}; take one at a time"
        )


def _is_scipy_sparse(source: object) -> bool:
    from scipy.sparse import issparse

    return bool(issparse(source))
