"""Laws 1 and 2: the matrix and its products."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.laws._law import (
    Measurement,
    claim,
    forward,
    law,
    norms,
    product,
    spectral,
    worst,
    worst_counted,
)


@law(1, invertible=False)
def matrix(case: Case) -> Iterator[Measurement]:
    """`to_dense` is the documented matrix: symmetric, positive (semi)definite, with the right diagonal."""
    P = case.operator
    M = P.to_dense().double()
    yield claim("shape", P.shape == M.shape == (*case.batch_shape, case.size, case.size))
    yield claim("shape of diagonal", P.diagonal().shape == M.shape[:-1])
    yield worst("to_dense against the definition", spectral(M - case.matrix), product(case) * case.norm)
    yield worst("symmetry of to_dense", spectral(M - M.mT), product(case) * case.norm)
    smallest = torch.linalg.eigvalsh((M + M.mT) / 2)[..., 0]
    yield worst("negative part of to_dense", (-smallest).clamp(min=0), product(case) * case.norm)
    diagonal = case.matrix.diagonal(dim1=-2, dim2=-1)
    gap = (P.diagonal().double() - diagonal).abs()
    yield worst("diagonal", gap, (product(case) * case.norm).unsqueeze(-1))


@law(2, invertible=False)
def products(case: Case) -> Iterator[Measurement]:
    """`@` is linear and equals the dense product, from both sides; batches are stacks, under `vmap` too."""
    P, limit = case.operator, product(case) * case.norm.unsqueeze(-1)
    sides = right_hand_sides(case)
    for kind, X in sides.items():
        yield worst(f"P @ {kind}", norms((P @ X).double() - case.matrix @ X.double()), limit * norms(X))
    X, Y = sides["random"], sides["in_range"]
    combined = (P @ (3 * X - Y)) - (3 * (P @ X) - P @ Y)
    yield worst("linearity", norms(combined), limit * (3 * norms(X) + norms(Y)))
    yield worst("X @ P", norms((X.mT @ P).mT - P @ X), limit * norms(X))
    x = X.reshape(-1, *X.shape[-2:])[0, :, 0]
    column = (P @ x.unsqueeze(-1)).squeeze(-1)
    vector = P @ x
    yield claim("shape of a product with a vector", vector.shape == column.shape)
    yield worst(
        "product with a vector", norms((vector - column).unsqueeze(-1)), limit * norms(x.unsqueeze(-1))
    )
    yield from _more_dimensions(case, X)
    if case.batch_shape:
        yield from _batch_is_stack(case, X)


def _more_dimensions(case: Case, X: Tensor) -> Iterator[Measurement]:
    """Right-hand sides with a dimension more than the batch, or with none of it, answer one by one."""
    several = torch.stack([X, -X, 2 * X])
    first = X.reshape(-1, *X.shape[-2:])[0]
    for name in ("product",) if case.recipe.singular else ("product", "solve", "inv_quad", "inv_congruence"):
        answer, P = _ANSWERS[name], case.operator
        apart = torch.stack([answer(P, Y) for Y in several])
        together = answer(P, several)
        yield claim(f"shape of {name} with a dimension more", together.shape == apart.shape)
        if together.shape == apart.shape:
            yield from _close(f"{name} with a dimension more", case, together, apart)
        expanded = answer(P, first.expand(X.shape))
        lone = answer(P, first)
        yield claim(f"shape of {name} without batch", lone.shape == expanded.shape)
        if lone.shape == expanded.shape:
            yield from _close(f"{name} without batch", case, lone, expanded)


def _batch_is_stack(case: Case, X: Tensor) -> Iterator[Measurement]:
    """Every element of the batch answers as it would alone, and `vmap` over the operator agrees."""
    indices = list(np.ndindex(*case.batch_shape))
    names = ("product",) if case.recipe.singular else tuple(_ANSWERS)
    singles = [case.single(i).operator for i in indices]
    flat = X.reshape(len(indices), *X.shape[-2:])
    expanded = case.operator.expand(case.batch_shape)
    for name in names:
        answer = _ANSWERS[name]
        stacked = torch.stack([answer(P, flat[i]) for i, P in enumerate(singles)])
        together = answer(case.operator, X).reshape(stacked.shape)
        yield from _close(f"batch: {name}", case, together, stacked)
        # One dimension at a time, as vmap takes it.
        mapped = answer
        for _ in case.batch_shape:
            mapped = torch.vmap(mapped)
        yield from _close(f"vmap: {name}", case, mapped(expanded, X).reshape(stacked.shape), stacked)


def _product(P: PrecisionOperator, X: Tensor) -> Tensor:
    return P @ X


def _solve(P: PrecisionOperator, X: Tensor) -> Tensor:
    return P.solve(X)


def _logdet(P: PrecisionOperator, X: Tensor) -> Tensor:
    return P.logdet()


def _inv_quad(P: PrecisionOperator, X: Tensor) -> Tensor:
    return P.inv_quad(X[..., 0])


def _inv_congruence(P: PrecisionOperator, X: Tensor) -> Tensor:
    return P.inv_congruence(X.mT)


def _inverse_diagonal(P: PrecisionOperator, X: Tensor) -> Tensor:
    return P.inverse_diagonal()


def _covariance(P: PrecisionOperator, X: Tensor) -> Tensor:
    # Roots are not unique, so a batch may choose another root than its elements do: compare F F^T.
    batch = P.batch_shape
    eye = torch.eye(P.size, dtype=P.dtype).reshape(P.size, *(1,) * len(batch), P.size)
    F = P.unwhiten(eye.expand(P.size, *batch, P.size)).double()
    return torch.einsum("i...a,i...b->...ab", F, F)


_ANSWERS = {
    "product": _product,
    "solve": _solve,
    "logdet": _logdet,
    "inv_quad": _inv_quad,
    "inv_congruence": _inv_congruence,
    "inverse_diagonal": _inverse_diagonal,
    "covariance": _covariance,
}


def _close(quantity: str, case: Case, left: Tensor, right: Tensor) -> Iterator[Measurement]:
    size = right.double().abs().amax() * torch.ones(())
    limit = 2 * max(forward(case), product(case))
    yield from worst_counted(quantity, (left.double() - right.double()).abs().amax(), limit * size, size)
