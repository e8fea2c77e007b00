"""The same problem in several libraries, each used as its documentation says, and what is asked of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from _families import Problem
from curvlin import BlockDiag, Dense, Diagonal, Isotropic, KroneckerSum, PrecisionOperator

warnings.filterwarnings("ignore")
import linear_operator  # noqa: E402
from linear_operator.operators import (  # noqa: E402
    BlockDiagLinearOperator,
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LowRankRootLinearOperator,
)

try:
    import cola
except ImportError:  # an optional peer
    cola = None


class NotOffered(Exception):
    """The library has no such question."""


class Iterative(Exception):
    """The library answers by Lanczos from each vector, which is no linear map to compare."""


class Route(ABC):
    """A way to ask. Every method takes a problem in the dtype of the comparison."""

    name: str
    available = True

    @abstractmethod
    def operator(self, problem: Problem) -> Any: ...

    def settings(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @abstractmethod
    def solve(self, P: Any, b: Tensor) -> Tensor: ...

    @abstractmethod
    def inv_quad(self, P: Any, b: Tensor) -> Tensor: ...

    @abstractmethod
    def logdet(self, P: Any) -> Tensor: ...

    def inverse_diagonal(self, P: Any) -> Tensor:
        raise NotOffered

    @abstractmethod
    def root(self, P: Any) -> Tensor:
        """R with ``R R^T`` the covariance of draws of N(0, P)."""

    @abstractmethod
    def inverse_root(self, P: Any) -> Tensor:
        """G with ``G G^T`` the covariance of draws of N(0, P^-1)."""


class Ours(Route):
    name = "curvlin"

    def operator(self, problem: Problem) -> PrecisionOperator:
        terms = [KroneckerSum([pair]) for pair in problem.terms]
        if problem.blocks is not None:
            return BlockDiag([Dense(B) for B in problem.blocks])
        if problem.d is not None:
            assert problem.U is not None
            return Diagonal(problem.d).update(problem.U)
        P: PrecisionOperator = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        if problem.shift is not None:
            shift = Isotropic(problem.shift, problem.b.numel())
            P = shift + P if problem.family.startswith("δI") else P + shift
        if problem.factor != 1.0:
            P = problem.factor * P
        return P if problem.U is None else P.update(problem.U)

    def solve(self, P: Any, b: Tensor) -> Tensor:
        return P.solve(b)

    def inv_quad(self, P: Any, b: Tensor) -> Tensor:
        return P.inv_quad(b)

    def logdet(self, P: Any) -> Tensor:
        return P.logdet()

    def inverse_diagonal(self, P: Any) -> Tensor:
        return P.inverse_diagonal()

    def root(self, P: Any) -> Tensor:
        return P.root_matvec(torch.eye(P.size, dtype=P.dtype)).mT

    def inverse_root(self, P: Any) -> Tensor:
        return P.unwhiten(torch.eye(P.size, dtype=P.dtype)).mT


class DenseCholesky(Route):
    """The matrix written out, in the same dtype: what no structure has to beat, but should not lose to."""

    name = "torch, dense Cholesky"

    def operator(self, problem: Problem) -> Tensor:
        return torch.linalg.cholesky(problem.dense())

    def solve(self, P: Tensor, b: Tensor) -> Tensor:
        return torch.cholesky_solve(b.unsqueeze(-1), P).squeeze(-1)

    def inv_quad(self, P: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(P, b.unsqueeze(-1), upper=False).square().sum()

    def logdet(self, P: Tensor) -> Tensor:
        return 2 * P.diagonal().log().sum()

    def inverse_diagonal(self, P: Tensor) -> Tensor:
        return torch.cholesky_inverse(P).diagonal()

    def root(self, P: Tensor) -> Tensor:
        return P

    def inverse_root(self, P: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(P.mT, torch.eye(len(P), dtype=P.dtype), upper=True)


class LinearOperatorRoute(Route):
    name = "linear_operator"

    def operator(self, problem: Problem) -> Any:
        if problem.blocks is not None:
            return BlockDiagLinearOperator(DenseLinearOperator(problem.blocks))
        if problem.d is not None:
            U, D = LowRankRootLinearOperator(problem.U), DiagLinearOperator(problem.d)
            return D + U if problem.family.startswith("diag") else U + D
        terms = [
            KroneckerProductLinearOperator(DenseLinearOperator(A), DenseLinearOperator(B))
            for A, B in problem.terms
        ]
        P = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        if problem.shift is not None:
            shift = ConstantDiagLinearOperator(problem.shift.unsqueeze(-1), problem.b.numel())
            P = shift + P if problem.family.startswith("δI") else P + shift
        if problem.factor != 1.0:
            P = problem.factor * P
        return P if problem.U is None else P + LowRankRootLinearOperator(problem.U)

    def solve(self, P: Any, b: Tensor) -> Tensor:
        return P.solve(b.unsqueeze(-1)).squeeze(-1)

    def inv_quad(self, P: Any, b: Tensor) -> Tensor:
        return P.inv_quad(b.unsqueeze(-1)).squeeze()

    def logdet(self, P: Any) -> Tensor:
        return P.logdet().squeeze()

    def root(self, P: Any) -> Tensor:
        return P.root_decomposition().root.to_dense()

    def inverse_root(self, P: Any) -> Tensor:
        return P.root_inv_decomposition().root.to_dense()


class LinearOperatorExact(LinearOperatorRoute):
    name = "linear_operator, fast computations off"

    def settings(self) -> contextlib.AbstractContextManager[Any]:
        return linear_operator.settings.fast_computations(False, False, False)


class LinearOperatorLarge(LinearOperatorRoute):
    """What runs above 800 rows, on a small matrix: the whole counts as large and its factors as small."""

    name = "linear_operator, max_cholesky_size(16)"

    def settings(self) -> contextlib.AbstractContextManager[Any]:
        return linear_operator.settings.max_cholesky_size(16)


class ColaRoute(Route):
    name = "CoLA"
    available = cola is not None

    def operator(self, problem: Problem) -> Any:
        psd, ops = cola.PSD, cola.ops
        if problem.blocks is not None:
            return ops.BlockDiag(*[psd(ops.Dense(B)) for B in problem.blocks])
        U = None if problem.U is None else ops.Dense(problem.U) @ ops.Dense(problem.U.mT)
        if problem.d is not None:
            D = ops.Diagonal(problem.d)
            return psd(D + U if problem.family.startswith("diag") else U + D)
        terms = [ops.Kronecker(psd(ops.Dense(A)), psd(ops.Dense(B))) for A, B in problem.terms]
        P = terms[0] if len(terms) == 1 else psd(terms[0] + terms[1])
        if problem.shift is not None:
            shift = ops.Diagonal(
                problem.shift.expand(problem.b.numel())
            )  # a multiple of I would lose gradients
            P = psd(shift + P if problem.family.startswith("δI") else P + shift)
        if problem.factor != 1.0:
            P = psd(problem.factor * P)
        return P if U is None else psd(P + U)

    def _algorithms(self) -> tuple[Any, Any]:
        """Of solves and determinants, and of functions."""
        return cola.linalg.Auto(), cola.linalg.Auto()

    def solve(self, P: Any, b: Tensor) -> Tensor:
        return cola.linalg.inv(P, self._algorithms()[0]) @ b

    def inv_quad(self, P: Any, b: Tensor) -> Tensor:
        return b @ self.solve(P, b)

    def logdet(self, P: Any) -> Tensor:
        return cola.linalg.logdet(P, self._algorithms()[0])

    def inverse_diagonal(self, P: Any) -> Tensor:
        return cola.linalg.diag(cola.linalg.inv(P, self._algorithms()[0]))

    def root(self, P: Any) -> Tensor:
        return self._function(cola.linalg.sqrt, P)

    def inverse_root(self, P: Any) -> Tensor:
        return self._function(cola.linalg.isqrt, P)

    def _function(self, function: Any, P: Any) -> Tensor:
        has_rule = isinstance(P, (cola.ops.Kronecker, cola.ops.BlockDiag))
        if P.shape[0] > 1000 and not has_rule and isinstance(self._algorithms()[1], cola.linalg.Auto):
            raise Iterative
        return function(P, self._algorithms()[1]).to_dense()


class ColaExact(ColaRoute):
    name = "CoLA, alg=Cholesky(), Eigh()"

    def _algorithms(self) -> tuple[Any, Any]:
        return cola.linalg.Cholesky(), cola.linalg.Eigh()


def routes(size: int) -> list[Route]:
    """Those that differ at this size: below 800 rows the peers' defaults are dense already."""
    always: list[Route] = [Ours(), DenseCholesky(), LinearOperatorRoute()]
    if size <= 800:
        return [*always, LinearOperatorLarge(), ColaRoute()]
    return [*always, LinearOperatorExact(), ColaRoute(), ColaExact()]


def versions() -> dict[str, str]:
    """Of everything that was measured."""
    found = {}
    for name in ("torch", "linear_operator", "mpmath", "numpy", "cola-ml", "cola-plum-dispatch", "beartype"):
        found[name] = importlib.metadata.version(name) if _installed(name) else "not installed"
    return found


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
