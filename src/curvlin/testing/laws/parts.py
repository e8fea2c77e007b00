"""Laws 7, 10 and 12: sums, parts, and changes of coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.diagonal import Isotropic
from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.laws._features import features
from curvlin.testing.laws._larger import summands
from curvlin.testing.laws._law import (
    UNCOUNTED,
    Measurement,
    claim,
    eps,
    forward,
    law,
    norms,
    product,
    spectral,
    whitened,
    worst,
    worst_counted,
)


@law(7, invertible=False)
def sums(case: Case) -> Iterator[Measurement]:
    """Closed sums do not depend on the order of their operands, in type or value, and act as sums."""
    P = case.operator
    X = right_hand_sides(case)["random"]
    others = list(summands(case))
    for name, Q in others:
        yield from addition(case, Q, name, X)
    zero = Isotropic(torch.zeros((), dtype=case.dtype), case.size)
    total = closed_sum(P, zero)
    if total is not None:
        yield worst("P + 0", norms(total @ X - P @ X), product(case) * case.norm.unsqueeze(-1) * norms(X))
    for (name, Q), (other, S) in itertools.pairwise(others):
        left, right = _nested(P, Q, S), _nested(S, Q, P)
        if left is not None and right is not None:
            limit = 4 * product(case) * _size_of(case, Q, S) * norms(X)
            yield worst(
                f"(P + {name}) + {other} = P + ({name} + {other})", norms(left @ X - right @ X), limit
            )


def addition(case: Case, Q: PrecisionOperator, name: str, X: Tensor) -> Iterator[Measurement]:
    """``P + Q`` against ``Q + P`` and against ``P @ X + Q @ X``."""
    P = case.operator
    left, right = closed_sum(P, Q), closed_sum(Q, P)
    yield claim(f"P + {name} closed as {name} + P", (left is None) == (right is None))
    if left is None or right is None:
        return
    yield claim(f"type of P + {name} and of {name} + P", type(left) is type(right))
    limit = 2 * product(case) * _size_of(case, Q) * norms(X)
    yield worst(f"(P + {name}) @ X = P @ X + {name} @ X", norms(left @ X - (P @ X + Q @ X)), limit)
    yield worst(f"(P + {name}) @ X = ({name} + P) @ X", norms(left @ X - right @ X), limit)
    yield claim(f"dtype of P + {name}", left.dtype == case.dtype)
    if not case.recipe.singular and name != "Dense":
        yield from _solved_sum(case, Q, name, left)


def _solved_sum(
    case: Case, Q: PrecisionOperator, name: str, total: PrecisionOperator
) -> Iterator[Measurement]:
    """The sum is solved as the matrix that it is: a rule may keep a part that only solving reads."""
    B = right_hand_sides(case)["random"]
    exact = case.matrix + Q.to_dense().double()
    X = total.solve(B).double()
    limit = 3 * product(case) * (_size_of(case, Q) * norms(X) + norms(B))
    yield worst(f"residual of (P + {name}).solve", norms(exact @ X - B.double()), limit)
    gap = (total.logdet().double() - torch.linalg.slogdet(exact)[1]).abs()
    logs = exact.diagonal(dim1=-2, dim2=-1).log().abs().sum(-1)
    limit = case.size * (forward(case) + product(case)) + 4 * eps(case) * logs
    yield from worst_counted(f"logdet of P + {name}", gap, limit, torch.ones(()))


def closed_sum(P: PrecisionOperator, Q: PrecisionOperator) -> PrecisionOperator | None:
    """``P + Q``, or None where it is not closed."""
    try:
        return P + Q
    except NotClosedError:
        return None


def _nested(P: PrecisionOperator, Q: PrecisionOperator, S: PrecisionOperator) -> PrecisionOperator | None:
    inner = closed_sum(P, Q)
    return None if inner is None else closed_sum(inner, S)


def _size_of(case: Case, *others: PrecisionOperator) -> Tensor:
    """Norm of the sum, bounded by the trace for the other summands."""
    extra = sum(Q.diagonal().detach().double().sum(-1) for Q in others)
    return (case.norm + extra).unsqueeze(-1)


@law(10)
def parts(case: Case) -> Iterator[Measurement]:
    """Marginals are inverses of blocks of the inverse, conditionals are blocks; updates undo downdates."""
    P, n = case.operator, case.size
    generator = case.generator(41)
    for k in sorted({1, n // 2, n - 1} - {0}):
        index = torch.randperm(n, generator=generator)[:k]
        rest = torch.tensor(sorted(set(range(n)) - set(index.tolist())), dtype=torch.long)
        yield from _part(case, index, f"{k} of {n} coordinates")
        if len(rest) and n * forward(case) <= UNCOUNTED:
            # log det P = log det P_BB + log det Schur.
            whole = P.marginal(index).logdet().double() + P.conditional(rest).logdet().double()
            gap = (whole - P.logdet().double()).abs()
            limit = torch.as_tensor(3 * n * forward(case)) + 4 * eps(case) * case.eigen[0].log().abs().sum(-1)
            yield from worst_counted(f"chain rule of logdet, {k} of {n}", gap, limit, torch.ones(()))
    yield from _part(case, torch.arange(n).flip(0), "all coordinates, reversed")
    U, V = (
        (torch.randn(n, 2, dtype=torch.float64, generator=generator) / n**0.5).to(case.dtype)
        * case.norm.sqrt().to(case.dtype)[..., None, None]
        for _ in range(2)
    )
    X = right_hand_sides(case)["random"]
    grown = case.norm.unsqueeze(-1) + sum(
        torch.linalg.matrix_norm(W.double()).square().unsqueeze(-1) for W in (U, V)
    )
    limit = 4 * product(case) * grown * norms(X)
    for what, changed, sign in (("update", P.update(U), 1), ("downdate", P.downdate(U / 16), -(2.0**-8))):
        exact = case.matrix + sign * (U.double() @ U.double().mT)
        yield worst(f"P.{what}(U)", norms(changed @ X - exact @ X.double()), limit)
        yield claim(f"dtype of P.{what}(U)", changed.dtype == case.dtype)
    yield worst("P.update(U).downdate(U) = P", norms(P.update(U).downdate(U) @ X - P @ X), limit)
    one, other = P.update(U).update(V), P.update(V).update(U)
    yield worst("order of two updates, product", norms(one @ X - other @ X), limit)
    solved = norms(one.solve(X) - other.solve(X)) / norms(one.solve(X))
    # The updates can only help the smallest eigenvalue, and raise the largest.
    allowed = forward(case) * grown / case.norm.unsqueeze(-1)
    yield from worst_counted("order of two updates, solve", solved, 2 * allowed, torch.ones(()))


def _part(case: Case, index: Tensor, name: str) -> Iterator[Measurement]:
    P = case.operator
    block = P.conditional(index)
    exact = case.matrix[..., index[:, None], index]
    yield worst(f"conditional, {name}", spectral(block.to_dense() - exact), product(case) * case.norm)
    yield claim(f"size of the conditional, {name}", block.size == len(index))
    allowed = 4 * forward(case)  # a matrix inverted twice, here and in the truth
    if allowed > UNCOUNTED:  # nothing could be said of the marginal, which may also be refused
        return
    exact = torch.linalg.inv(case.inverse[..., index[:, None], index])
    marginal = P.marginal(index)
    yield claim(f"size of the marginal, {name}", marginal.size == len(index))
    yield worst(f"marginal, {name}", spectral(marginal.to_dense() - exact), allowed * case.norm)


@law(12)
def congruence(case: Case) -> Iterator[Measurement]:
    """``J P^-1 K^T`` is the dense one, symmetric, with the right diagonal, and follows a permutation."""
    P, n = case.operator, case.size
    sides = right_hand_sides(case)
    J = torch.cat([sides["random"], sides["in_range"], sides["in_complement"]], dim=-1).mT
    K = sides["product"].mT
    full = P.inv_congruence(J)
    yield claim("a congruence is symmetric to the bit", bool((full == full.mT).all()))
    XJ, XK = (case.solution(rows.mT) for rows in (J, K))
    # Entry (i, j) of J P^-1 E P^-1 K^T is at most |E| |P^-1 J_i| |P^-1 K_j|.
    norm = case.norm[..., None, None]
    exact = J.double() @ XJ
    energies = exact.diagonal(dim1=-2, dim2=-1)
    size = _outer(energies, energies).sqrt()
    limit = whitened(case) * (norm * _outer(norms(XJ), norms(XJ)) + size)
    yield from worst_counted("J P^-1 J^T", (full.double() - exact).abs(), limit, size)
    diagonal = P.inv_congruence_diagonal(J).double()
    limit = limit.diagonal(dim1=-2, dim2=-1)
    yield from worst_counted("diagonal of J P^-1 J^T", (diagonal - energies).abs(), limit, energies)
    cross, exact = P.inv_congruence(J, K).double(), J.double() @ XK
    size = _outer(norms(J.mT), norms(XK))
    limit = whitened(case) * (norm * _outer(norms(XJ), norms(XK)) + size)
    yield from worst_counted("J P^-1 K^T", (cross - exact).abs(), limit, size)
    yield from features(case)
    if forward(case) > UNCOUNTED or n == 1:
        return
    # Permuting the coordinates permutes the answers: S P S^T, solved, is S P^-1 S^T.
    order = torch.randperm(n, generator=case.generator(43))
    permuted = P.conditional(order)
    B = sides["random"]
    gap = norms(permuted.solve(B[..., order, :]) - P.solve(B)[..., order, :]) / norms(P.solve(B))
    yield worst("solve of a permuted operator", gap, 2 * (forward(case) + product(case) * case.condition))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)
