"""Laws 3, 4, 5 and 8: solves, quadratic forms, log-determinants, inverses."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from curvlin.errors import NotClosedError
from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.laws._larger import larger, summands
from curvlin.testing.laws._law import (
    EPS64,
    UNCOUNTED,
    Measurement,
    backward,
    claim,
    eps,
    forward,
    law,
    norms,
    product,
    whitened,
    worst,
    worst_counted,
)


@law(3)
def solve(case: Case) -> Iterator[Measurement]:
    """`solve` leaves a residual of rounding at any condition number, and inverts the product."""
    P, norm = case.operator, case.norm.unsqueeze(-1)
    sides = right_hand_sides(case)
    for kind, B in sides.items():
        X = P.solve(B).double()
        residual = norms(case.matrix @ X - B.double())
        yield worst(f"residual, {kind}", residual, backward(case) * (norm * norms(X) + norms(B)))
    X = sides["random"]
    back = P.solve(P @ X).double()
    # The right-hand side is itself a rounded product.
    limit = torch.full_like(norms(X), forward(case) + 2 * case.size * eps(case) * case.condition)
    yield from worst_counted("solve(P @ x) = x", norms(back - X.double()) / norms(X), limit, torch.ones(()))


@law(4)
def quadratic_form(case: Case) -> Iterator[Measurement]:
    """`inv_quad` is non-negative, equals ``b . solve(b)``, and shrinks when P grows."""
    P = case.operator.factor()
    exceeding = [(name, Q.factor()) for name, Q in larger(P)] if _monotone_to(case) else []
    for kind, B in right_hand_sides(case).items():
        b = B[..., 0]
        q = P.inv_quad(b)
        yield claim(f"inv_quad >= 0, {kind}", bool((q >= 0).all()))
        exact, x = case.energy(B[..., :1])[..., 0], case.solution(B[..., :1])[..., 0]
        # A perturbation E of P moves q by x^T E x, which is tiny where x is, as for b in the range of P.
        limit = whitened(case) * (case.norm * x.square().sum(-1) + exact)
        yield from worst_counted(f"inv_quad, {kind}", (q.double() - exact).abs(), limit, exact)
        against = (b.double() * P.solve(b.unsqueeze(-1)).squeeze(-1).double()).sum(-1)
        length = torch.linalg.vector_norm
        limit = backward(case) * case.condition * length(b.double(), dim=-1) * length(x, dim=-1)
        yield from worst_counted(f"b . solve(b), {kind}", (q.double() - against).abs(), limit, exact)
        for name, Q in exceeding:
            excess = (Q.inv_quad(b).double() - _monotone_to(case) * q.double()).clamp(min=0)
            yield worst(f"inv_quad of {name} is not larger, {kind}", excess, 0.0)


def _monotone_to(case: Case) -> float:
    """The factor by which rounding may break monotonicity; 0 where that says nothing."""
    slack = 2 * forward(case)
    return 1 + slack if slack < UNCOUNTED else 0.0


@law(5)
def log_determinant(case: Case) -> Iterator[Measurement]:
    """`logdet` is the log-determinant: scaling, monotonicity, inverse, determinant lemma, blocks."""
    P, n = case.operator, case.size
    value = P.logdet().double()
    exact = case.logdet
    limit = _logdet_limit(case)
    yield from worst_counted("logdet", (value - exact).abs(), limit, torch.ones(()))
    for c in (3.0, 2.0**-40):
        gap = (c * P).logdet().double() - value - n * float(torch.tensor(c, dtype=torch.float64).log())
        yield from worst_counted(
            f"logdet of {c:.0e} P", gap.abs(), 2 * limit + eps(case) * 40 * n, torch.ones(())
        )
    yield worst("logdet of the inverse", (P.inverse().logdet().double() + value).abs(), 0.0)
    yield worst(
        "logdet of a Covariance's inverse", (P.inverse().inverse().logdet().double() - value).abs(), 0.0
    )
    for name, Q in larger(P):
        # n log 2 for 2 P; any other growth is positive, up to rounding of the two values.
        drop = (value - Q.logdet().double()).clamp(min=0)
        yield from worst_counted(f"logdet of {name} is not smaller", drop, 2 * limit, torch.ones(()))
    generator = case.generator(3)
    U = torch.randn(n, 2, dtype=torch.float64, generator=generator).to(case.dtype)
    U = U * case.norm.sqrt().to(case.dtype)[..., None, None]
    gain = P.update(U).logdet().double() - value
    small = torch.eye(2, dtype=torch.float64) + U.mT.double() @ case.inverse @ U.double()
    lemma = (gain - torch.linalg.slogdet(small)[1]).abs()
    yield from worst_counted("determinant lemma", lemma, 2 * limit + 4 * forward(case), torch.ones(()))
    from curvlin.precision.block_diag import BlockDiag

    blocks = BlockDiag([P, 2 * P]).logdet().double()
    total = value + (2 * P).logdet().double()
    yield worst("logdet of blocks", (blocks - total).abs(), 4 * eps(case) * (value.abs() + total.abs()))


def _logdet_limit(case: Case) -> Tensor:
    """The first-order effect ``tr(P^-1 E)`` of an allowed perturbation, and the rounding of the sum."""
    values = case.eigen[0]
    floor = case.size * EPS64 * values[..., -1:]
    trace = (values[..., -1:] / torch.maximum(values, floor)).sum(-1)
    logs = torch.maximum(values, floor).log().abs().sum(-1)
    return whitened(case) * trace + 2 * (eps(case) + EPS64) * logs


@law(8)
def inverse(case: Case) -> Iterator[Measurement]:
    """`inverse` acts as a solve and undoes itself; `inverse_diagonal` and `trace_solve` belong to it."""
    P = case.operator
    C = P.inverse()
    yield claim(
        "inverse().inverse() is the operator", C.inverse() is P or bool(C.inverse().allclose(P, rtol=0.0))
    )
    X = right_hand_sides(case)["random"]
    yield worst("P.inverse() @ X = P.solve(X)", (C @ X - P.solve(X)).abs().amax(), 0.0)
    exact, rows = case.energy(torch.eye(case.size)), case.inverse
    limit = backward(case) * (case.norm.unsqueeze(-1) * rows.square().sum(-2) + exact)
    if case.recipe.base is not None and not case.recipe.splits_leverage:
        # The variances of the base, less what the low rank part explains.
        limit = limit + forward(case) * exact
    yield from worst_counted("inverse_diagonal", (P.inverse_diagonal().double() - exact).abs(), limit, exact)
    yield claim("inverse_diagonal > 0", bool((P.inverse_diagonal() > 0).all()))
    yield from _traces(case)
    try:
        trace = P.trace_solve(P).double()
    except NotClosedError:
        return
    values = case.eigen[0]
    allowed = backward(case) * (values[..., -1:] / values.clamp(min=0)).sum(-1) + eps(case) * case.size
    if case.recipe.base is not None:
        allowed = allowed + forward(case) * case.size
    yield from worst_counted(
        "trace_solve(P) = D", (trace - case.size).abs(), allowed, torch.tensor(case.size)
    )


def _traces(case: Case) -> Iterator[Measurement]:
    """``tr(P^-1 Q)`` and ``tr(Q^-1 P)`` for other structures, where the table has a rule."""
    P, n, root = case.operator, case.size, _root(case.matrix)
    for name, Q in itertools.chain(summands(case), larger(P)):
        if Q is P:
            continue
        M = Q.to_dense().double()
        # A relative error C u cond of either inverse; what is larger than P may be solved by way of P. A change of
        # few directions is n, or the trace of a base, less what the directions take: n counts as well.
        own = _spread(M)
        condition = max(case.condition, own) if "P" in name else own
        for what, ask, exact, allowed in (
            (
                f"tr(P^-1 ({name}))",
                partial(P.trace_solve, Q),
                (case.inverse * M).sum((-2, -1)),
                forward(case),
            ),
            (
                f"tr(({name})^-1 P)",
                partial(Q.trace_solve, P),
                _whitened(M, root).square().sum((-2, -1)),
                backward(case) * condition + 10 * product(case),
            ),
        ):
            with contextlib.suppress(NotClosedError):
                trace = ask().double()
                yield claim(f"shape of {what}", trace.shape == case.batch_shape)
                limit = torch.as_tensor(n * allowed) * (exact + n)
                yield from worst_counted(what, (trace - exact).abs(), limit, exact)


def _spread(M: Tensor) -> float:
    values = torch.linalg.eigvalsh(M)
    return float((values[..., -1] / values[..., 0]).max())


def _root(M: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    root: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return root


def _whitened(M: Tensor, root: Tensor) -> Tensor:
    """``L^-1 R`` with ``L L^T = M``: the trace of ``M^-1 R R^T`` is a sum of its squares."""
    half: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(M), root, upper=False)
    return half
