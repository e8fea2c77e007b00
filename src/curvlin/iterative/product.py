"""What a matvec-only operator multiplies with: functions, matrices, exact operators, features, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array, issparse
from torch import Tensor

from curvlin._check import floating, positive_integer, same_kind, symmetric
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
        like: a tensor of its dtype and device.
        size: D.
        colour: ``(Z, *tensors) -> L Z`` for Z of shape ``(noise, K)``.
        noise: the number of columns of L.
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


@dataclass(frozen=True)
class Product:
    """``X -> P X`` for the sum of some terms of one size, dtype and device."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("source must have at least one term, found an empty list")
        for term in self.terms[1:]:
            if term.size != self.size:
                raise ValueError(f"all terms must have {self.size} rows, found {term.size}")
            same_kind("every term", term.like, self.like)

    @property
    def size(self) -> int:
        """D."""
        return self.terms[0].size

    @property
    def like(self) -> Tensor:
        """A tensor of its dtype and device."""
        return self.terms[0].like

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What derivatives are taken with respect to."""
        return tuple(t for term in self.terms for t in term.tensors)

    def __add__(self, other: Product) -> Product:
        """The sum."""
        return Product(self.terms + other.terms)

    def scaled(self, c: Tensor) -> Product:
        """``c`` times this."""
        return Product(tuple(term.scaled(c) for term in self.terms))

    def multiply(self, X: Tensor, *tensors: Tensor) -> Tensor:
        """``P X`` with these in the place of the tensors."""
        parts = [term.multiply(X, *own) for term, own in self._with_own(tensors)]
        return sum(parts[1:], parts[0])

    def __call__(self, X: Tensor) -> Tensor:
        """``P X``, a function of X alone.

        Raises:
            ValueError: if it is not finite.
        """
        with torch.no_grad():
            return floating("the product with source", self.multiply(X, *(t.detach() for t in self.tensors)))

    def coloured(self, noise: Callable[[int], Tensor]) -> Tensor:
        """``sum_i L_i z_i``, whose covariance is P, for ``noise(size) -> z`` of shape ``(size, K)``.

        Raises:
            NotClosedError: if a term has no root.
        """
        parts = []
        for term, own in self._with_own(self.tensors):
            if term.colour is None:
                raise NotClosedError(
                    "a term of this IterativePrecision has no root to draw from; give its function as root=, or "
                    'use sample(method="lanczos")'
                )
            parts.append(term.colour(noise(term.noise), *own))
        return sum(parts[1:], parts[0])

    def _with_own(self, tensors: Sequence[Tensor]) -> list[tuple[Term, tuple[Tensor, ...]]]:
        queue = iter(tensors)
        return [(term, tuple(islice(queue, len(term.tensors)))) for term in self.terms]


def of_operator(P: PrecisionOperator) -> Term:
    """An exact operator; its root serves for samples."""
    _unbatched("source", P.batch_shape)
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
    _unbatched("source", Phi.batch_shape)
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
        symmetric("source", matrix)
        _unbatched("source", matrix.shape[:-2])
        return Term(lambda X, A: A @ X, (matrix,), matrix.detach(), len(matrix))
    _one_square(matrix.shape, matrix.dtype, matrix.is_floating_point())
    if matrix.requires_grad:
        raise TypeError(
            "a sparse source that requires grad is not supported; pass a function (X, values) -> P X and "
            "parameters=(values,)"
        )
    like = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
    if matrix.device.type != "cpu":
        return _tried(Term(lambda X: matrix @ X, (), like, len(matrix)))
    entries = matrix.to_sparse_coo().coalesce()
    return of_scipy(
        coo_array((entries.values().numpy(), entries.indices().numpy()), shape=tuple(matrix.shape))
    )


def of_scipy(matrix: Any) -> Term:
    """A symmetric sparse matrix of SciPy, whose products on the CPU are several times faster than torch's."""
    _one_square(matrix.shape, matrix.dtype, matrix.dtype in (np.float32, np.float64))
    rows = matrix.tocsr()

    def multiply(X: Tensor) -> Tensor:
        return torch.from_numpy(rows @ X.detach().numpy())

    like = torch.from_numpy(np.empty(0, dtype=matrix.dtype))
    return _tried(Term(multiply, (), like, matrix.shape[0]))


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

    def multiply(X: Tensor, *tensors: Tensor) -> Tensor:
        product = function(X, *tensors)
        if not isinstance(product, Tensor) or product.shape != X.shape or product.dtype != X.dtype:
            raise ValueError(
                f"the product of {X.dtype} of shape {tuple(X.shape)} must be like it, found {_described(product)}"
            )
        return product.clone()  # for functions that return the same buffer each time

    def coloured(Z: Tensor, *tensors: Tensor) -> Tensor:
        assert root is not None
        draws = root(Z, *tensors)
        if not isinstance(draws, Tensor) or draws.shape != (size, Z.shape[-1]) or draws.dtype != Z.dtype:
            raise ValueError(
                f"root must map {tuple(Z.shape)} to {(size, Z.shape[-1])} in {Z.dtype}, found {_described(draws)}"
            )
        return draws

    noise = size if root_size is None else positive_integer("root_size", root_size)
    return _tried(Term(multiply, tuple(parameters), like, size, None if root is None else coloured, noise))


def product_of(
    source: Any,
    parameters: Sequence[Tensor] = (),
    size: int | None = None,
    like: Tensor | None = None,
    root: Function | None = None,
    root_size: int | None = None,
) -> Product:
    """The product with whatever was given.

    Raises:
        TypeError: for what belongs to a function, beside something else.
        ValueError: for one root beside several functions.
    """
    functions = sum(map(_is_function, source)) if isinstance(source, (list, tuple)) else _is_function(source)
    own = {
        "parameters": parameters,
        "size": size,
        "dtype or device": like,
        "root": root,
        "root_size": root_size,
    }
    for name, value in own.items():
        if functions == 0 and value is not None and value != ():
            raise TypeError(f"{name} must be left out, found it beside a source that is not a function")
    if functions > 1 and root is not None:
        raise ValueError(
            f"root must belong to one function, found {functions}; make each an IterativePrecision with its own root"
        )
    if isinstance(source, (list, tuple)):
        given = parameters, size, like, root, root_size
        parts = [product_of(part, *(given if _is_function(part) else ())) for part in source]
        return Product(tuple(term for part in parts for term in part.terms))
    if isinstance(known := getattr(source, "_product", None), Product):  # an IterativePrecision
        return known
    return Product((_term_of(source, parameters, size, like, root, root_size),))


def _term_of(
    source: Any,
    parameters: Sequence[Tensor],
    size: int | None,
    like: Tensor | None,
    root: Function | None,
    root_size: int | None,
) -> Term:
    if isinstance(source, PrecisionOperator):
        return of_operator(source)
    if isinstance(source, FeatureOperator):
        return of_features(source)
    if isinstance(source, Tensor):
        return of_matrix(source)
    if issparse(source):
        return of_scipy(source)
    if callable(source):
        return of_function(source, parameters, size, like, root, root_size)
    raise TypeError(
        "source must be a function, a matrix, a precision or feature operator, or a list of them, found "
        f"{type(source).__name__}"
    )


def _is_function(source: Any) -> bool:
    known = PrecisionOperator, FeatureOperator, Tensor
    return callable(source) and not isinstance(source, known) and not hasattr(source, "_product")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _tried(term: Term) -> Term:
    """The term, after one product with two fixed vectors.

    Raises:
        ValueError: if the product is not finite, not symmetric, or depends on hidden tensors that require grad, whose
            derivatives would be lost without a word.
    """
    position = torch.arange(1, term.size + 1, dtype=torch.float64, device=term.like.device)
    X = torch.stack([torch.cos(0.7 * position), torch.cos(1.3 * position)], dim=-1).to(term.like.dtype)
    given = X.clone()
    with torch.enable_grad():
        product = term.multiply(X, *(t.detach() for t in term.tensors))
    if not torch.equal(X, given):
        raise ValueError("source must leave its argument as it is, found one that changes it")
    if product.requires_grad:
        raise ValueError(
            "source closes over tensors that require grad; pass them as parameters=(...), or detach them"
        )
    floating("the product with source", product)
    forms = X.double().mT @ product.double()
    gap = float((forms - forms.mT).abs().max())
    size = float(torch.linalg.matrix_norm(X.double()) * torch.linalg.matrix_norm(product.double()))
    if gap > torch.finfo(X.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"source must be symmetric, found x^T P y and y^T P x that differ by {gap / size:.1e}"
        )
    return term


def _one_square(shape: Sequence[int], dtype: object, is_floating: bool) -> None:
    if not is_floating:
        raise TypeError(f"source must have a floating dtype, found {dtype}")
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"source must be one square matrix, found shape {tuple(shape)}")


def _unbatched(name: str, batch: torch.Size) -> None:
    if len(batch) > 0:
        raise ValueError(
            f"{name} must be one operator, found a batch of shape {tuple(batch)}; take one at a time"
        )
