"""A case: an operator, the free tensors it is made of, and its dense matrix made without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from curvlin.precision.base import PrecisionOperator
from curvlin.testing.oracle import Reference

EXACT_SIZE = 24
"""Up to this size the truth is computed in arbitrary precision, above from a dense Cholesky factor."""


@dataclass(frozen=True)
class Arrays:
    """The few array functions an assembly formula needs, so that one formula serves three number systems."""

    kron: Callable[[Any, Any], Any]
    diag: Callable[[Any], Any]
    eye: Callable[[int], Any]
    constant: Callable[[Any], Any]


TORCH = Arrays(torch.kron, torch.diag, lambda n: torch.eye(n, dtype=torch.float64), torch.as_tensor)
OBJECTS = Arrays(np.kron, np.diag, lambda n: np.eye(n).astype(int).astype(object), np.asarray)

Assembly = Callable[..., Any]
"""``assemble(xp, *parameters) -> matrix``; `xp` is `TORCH` (differentiable) or `OBJECTS` (80 digits)."""


@dataclass(frozen=True)
class Parameter:
    """A tensor an operator is made from: `ndim` trailing dimensions are its own, the rest is batch."""

    tensor: Tensor
    ndim: int
    symmetric: bool = False
    differentiable: bool = True


@dataclass(frozen=True)
class Recipe:
    """How an operator and its dense matrix come from the same parameters, by two separate routes."""

    parameters: tuple[Parameter, ...]
    build: Callable[..., PrecisionOperator]
    assemble: Assembly
    size: int
    # Exact eigenvalues of the matrix before its parameters were rounded to the storage dtype, where known.
    spectrum: Tensor | None = None
    # Roundings to the storage dtype, relative to the norm of P, that the constructor itself makes (a sum of a
    # matrix and a damping, a product of a root with itself). They are part of what the caller asked for.
    storage_roundings: float = 0.0
    # For base + low rank: the dense formula of the base. Answers come from the inverse of the base, so it is the
    # smallest eigenvalue of the base that they depend on, even where the low rank part lifts it.
    base: Assembly | None = None
    # Whether variances must be right per entry however small the leverage leaves them (diagonal bases).
    splits_leverage: bool = False
    # Whether quadratic forms, roots and determinants lose the condition of a root of the base: in a downdate of an
    # update, and in an update with as many columns as rows over a base that is not diagonal.
    whitening_costs: bool = False
    # Positive semidefinite but not definite, by construction.
    singular: bool = False
    # Whether samples and roots have derivatives; where not, asking for one is refused by name. None: it may be.
    differentiable_roots: bool | None = True


@dataclass(frozen=True, eq=False)
class Case:
    """An operator together with the truth about it.

    Attributes:
        kind: which builder made it; with `spec` this is enough to make it again.
        recipe: parameters, builder and assembly.
        spec: what was asked for; printed in failures.
        seed: of what laws draw.
    """

    kind: str
    recipe: Recipe
    spec: Any = None
    seed: int = 0

    def __repr__(self) -> str:
        return f"make_case({self.kind!r}, {self.spec})" if self.spec is not None else f"Case({self.kind!r})"

    @classmethod
    def of(
        cls,
        P: PrecisionOperator,
        dense: Tensor | Callable[[Any], Tensor] | None = None,
        kind: str | None = None,
        singular: bool = False,
    ) -> Case:
        """A case around any operator, with its own tensors as parameters.

        Args:
            P: the operator.
            dense: its dense matrix, or a differentiable function from the operator to it. When None, the
                matrix is ``P.to_dense()``, and laws can only find that P contradicts itself.
            kind: a name for reports.
            singular: P is positive semidefinite without an inverse, so that asking for one must be refused.
        """
        leaves, treedef = pytree.tree_flatten(P)
        parameters = tuple(
            Parameter(t.detach(), n, symmetric=_is_symmetric(t, n), differentiable=not constant)
            for t, (_, n), constant in zip(leaves, P._tensors(), _constants(P), strict=True)
        )

        def build(*tensors: Tensor) -> PrecisionOperator:
            rebuilt: PrecisionOperator = pytree.tree_unflatten(list(tensors), treedef)
            return rebuilt

        def assemble(xp: Arrays, *tensors: Any) -> Any:
            # Entries exact to float64 only: there is no other formula.
            operator = build(*(tensors if xp is TORCH else map(_float64, tensors)))
            if dense is None:
                matrix = operator.to_dense()
            else:
                matrix = dense.double() if isinstance(dense, Tensor) else dense(operator)
            return matrix if xp is TORCH else _objects(matrix)

        recipe = Recipe(parameters, build, assemble, P.size, singular=singular, differentiable_roots=None)
        return cls(kind or type(P).__name__, replace(recipe, **_change_of_a_base(P, build)))

    # -- the operator ----------------------------------------------------------------------------------------

    @cached_property
    def operator(self) -> PrecisionOperator:
        """The operator under test."""
        return self.recipe.build(*self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters' tensors, in the storage dtype."""
        return tuple(p.tensor for p in self.recipe.parameters)

    @property
    def size(self) -> int:
        """D."""
        return self.recipe.size

    @property
    def dtype(self) -> torch.dtype:
        """The storage dtype."""
        return self.tensors[0].dtype

    @cached_property
    def batch_shape(self) -> torch.Size:
        """The broadcast of the parameters' batch dimensions."""
        shapes = [p.tensor.shape[: p.tensor.ndim - p.ndim] for p in self.recipe.parameters]
        batch: torch.Size = torch.broadcast_shapes(*shapes)
        return batch

    def rebuilt(self, tensors: Sequence[Tensor]) -> PrecisionOperator:
        """The operator on other tensors; symmetric parameters are symmetrised first."""
        return self.recipe.build(*self.symmetrised(tensors))

    def symmetrised(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors with every symmetric parameter replaced by its symmetric part."""
        pairs = zip(tensors, self.recipe.parameters, strict=True)
        return [(t + t.mT) / 2 if p.symmetric else t for t, p in pairs]

    def to(self, dtype: torch.dtype) -> Case:
        """The same case with its parameters rounded to another dtype."""
        return self._map(lambda p: replace(p, tensor=p.tensor.to(dtype)))

    def single(self, index: tuple[int, ...]) -> Case:
        """One element of the batch."""
        batch = self.batch_shape

        def pick(p: Parameter) -> Parameter:
            own = p.tensor.shape[p.tensor.ndim - p.ndim :]
            return replace(p, tensor=p.tensor.expand((*batch, *own))[index])

        return self._map(pick)

    def _map(self, change: Callable[[Parameter], Parameter]) -> Case:
        parameters = tuple(change(p) for p in self.recipe.parameters)
        return Case(self.kind, replace(self.recipe, parameters=parameters), self.spec, self.seed)

    # -- the truth -------------------------------------------------------------------------------------------

    def dense(self, tensors: Sequence[Tensor]) -> Tensor:
        """The dense matrix of an element without batch, differentiable in the tensors."""
        matrix: Tensor = self.recipe.assemble(TORCH, *[t.double() for t in self.symmetrised(tensors)])
        return matrix

    @cached_property
    def matrix(self) -> Tensor:
        """The dense matrix in float64, ``(*batch, D, D)``, of the parameters as stored."""
        if not self.batch_shape:
            with torch.no_grad():
                return self.dense(self.tensors).detach()
        indices = np.ndindex(*self.batch_shape)
        singles = torch.stack([self.single(i).matrix for i in indices])
        return singles.reshape(*self.batch_shape, self.size, self.size)

    def exact(self, digits: int = 80) -> Reference:
        """The truth of an element without batch, with no rounding of the stored parameters."""
        with mpmath.workdps(digits):
            arrays = [_objects(t) for t in self.tensors]
            return Reference(self.recipe.assemble(OBJECTS, *arrays), digits)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of the dense matrix."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    @cached_property
    def norm(self) -> Tensor:
        """The largest eigenvalue, ``(*batch)``."""
        return self.eigen[0][..., -1]

    @cached_property
    def condition(self) -> float:
        """The largest condition number over the batch (see `Recipe.base`), at most ``1 / (D eps)``."""
        largest, smallest = self.norm, self.eigen[0][..., 0]
        if self.recipe.base is not None:
            base = Case(self.kind, replace(self.recipe, assemble=self.recipe.base, base=None), self.spec)
            smallest = torch.minimum(smallest, base.eigen[0][..., 0])
        floor = self.size * torch.finfo(torch.float64).eps * largest
        return float((largest / torch.maximum(smallest, floor)).max())

    @cached_property
    def _references(self) -> list[Reference]:
        """The truth of every element of the batch, in order."""
        return [self.single(i).exact() for i in np.ndindex(*self.batch_shape)]

    @cached_property
    def _lower(self) -> Tensor:
        lower: Tensor = torch.linalg.cholesky(self.matrix)
        return lower

    def solution(self, B: Tensor) -> Tensor:
        """``P^-1 B`` in float64: exact for up to `EXACT_SIZE` rows, above from a dense Cholesky factor."""
        columns = B.double().expand((*self.batch_shape, *B.shape[-2:]))
        if self.size > EXACT_SIZE:
            return torch.cholesky_solve(columns, self._lower)
        flat = columns.reshape(-1, *columns.shape[-2:])
        return torch.stack([r.solve(c) for r, c in zip(self._references, flat, strict=True)]).reshape(
            columns.shape
        )

    def energy(self, B: Tensor) -> Tensor:
        """``b^T P^-1 b`` of every column, as exact as `solution`."""
        columns = B.double().expand((*self.batch_shape, *B.shape[-2:]))
        if self.size > EXACT_SIZE:
            half: Tensor = torch.linalg.solve_triangular(self._lower, columns, upper=False)
            return half.square().sum(-2)
        flat = columns.reshape(-1, *columns.shape[-2:])
        values = [[r.inv_quad(b) for b in c.mT] for r, c in zip(self._references, flat, strict=True)]
        return torch.tensor(values, dtype=torch.float64).reshape(*self.batch_shape, -1)

    @cached_property
    def inverse(self) -> Tensor:
        """The dense inverse."""
        return self.solution(torch.eye(self.size, dtype=torch.float64))

    @cached_property
    def logdet(self) -> Tensor:
        """The log-determinant."""
        if self.size > EXACT_SIZE:
            return 2 * self._lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.stack([r.logdet() for r in self._references]).reshape(self.batch_shape)

    def generator(self, salt: int = 0) -> torch.Generator:
        """A source of randomness that belongs to this case."""
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + salt)


def right_hand_sides(case: Case, columns: int = 2) -> dict[str, Tensor]:
    """Right-hand sides of every kind, each ``(*batch, D, columns)`` in the case's dtype.

    A solver that is right for a random vector can lose every digit for a vector in the range of its large
    eigenvalues, where the solution is small (residuals and gradients live there), so each part has its own
    column.
    """
    generator = case.generator(17)
    shape = (*case.batch_shape, case.size, columns)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    _, vectors = case.eigen
    count = max(1, case.size // 4)
    weights = torch.randn(*case.batch_shape, count, columns, dtype=torch.float64, generator=generator)
    kinds = {
        "random": noise,
        "in_range": vectors[..., -count:] @ weights,
        "in_complement": vectors[..., :count] @ weights,
        "product": case.matrix @ noise,
        "zero": torch.zeros_like(noise),
        "huge": noise * 2.0**40,
    }
    return {kind: X.to(case.dtype) for kind, X in kinds.items()}


def _constants(value: Any, constant: bool = False) -> Iterator[bool]:
    """For each tensor of a tree, in order, whether its field is one that no derivative flows into."""
    if isinstance(value, Tensor):
        yield constant
    elif isinstance(value, tuple):
        for part in value:
            yield from _constants(part, constant)
    elif value is not None:
        for field_ in fields(value):
            if not field_.metadata.get("static"):
                part = getattr(value, field_.name)
                yield from _constants(part, constant or bool(field_.metadata.get("constant")))


def _change_of_a_base(P: PrecisionOperator, build: Callable[..., PrecisionOperator]) -> dict[str, Any]:
    """What a recipe has to say of a base changed in a few directions."""
    from curvlin.precision.diagonal import Diagonal, Isotropic
    from curvlin.precision.low_rank import Woodbury

    if not isinstance(P, Woodbury):
        return {}

    def base(xp: Arrays, *tensors: Any) -> Any:
        operator = build(*(tensors if xp is TORCH else map(_float64, tensors)))
        while isinstance(operator, Woodbury):
            operator = operator.base
        return operator.to_dense() if xp is TORCH else _objects(operator.to_dense())

    diagonal = isinstance(P.base, (Diagonal, Isotropic))
    return {
        "base": base,
        "splits_leverage": diagonal and isinstance(P.U, Tensor),
        "whitening_costs": (P.sign < 0 and isinstance(P.base, Woodbury))
        or (not diagonal and P.rank >= P.size),
    }


def _is_symmetric(t: Tensor, ndim: int) -> bool:
    return ndim == 2 and t.shape[-1] == t.shape[-2] and t.shape[-1] > 1 and bool((t == t.mT).all())


def _float64(numbers: Any) -> Tensor:
    """Back from `_objects`, which is exact for what was a tensor."""
    return torch.from_numpy(np.asarray(numbers, dtype=np.float64))


def _objects(tensor: Tensor) -> Any:
    numbers = tensor.detach().double().numpy()
    return np.vectorize(mpmath.mpf, otypes=[object])(numbers)
