"""Law 6: scale equivariance, which no absolute constant survives."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.laws._law import (
    EPS64,
    Measurement,
    claim,
    differing,
    eps,
    forward,
    law,
    norms,
    product,
    worst,
    worst_counted,
)


@law(6)
def scale(case: Case) -> Iterator[Measurement]:
    """Answers of ``c P`` are those of P times a power of c: the same bits for powers of two (roots: four)."""
    P = case.operator.factor()  # asked many times; law 14 shows that this changes nothing
    sides = right_hand_sides(case)
    X = torch.cat([sides[kind] for kind in ("random", "in_range", "in_complement")], dim=-1)
    rows = X.mT
    answers = {
        "solve": P.solve(X),
        "inverse_diagonal": P.inverse_diagonal(),
        "congruence": P.inv_congruence(rows),
    }
    answers["congruence diagonal"] = P.inv_congruence_diagonal(rows)
    logdet, multiplied, diagonal = P.logdet().double(), P @ X, P.diagonal()
    logs = case.eigen[0].abs().log().abs().sum(-1)
    for exponent in (40, -40, 7, -13):
        c = 2.0**exponent
        Q = (c * P).factor()
        found = {
            "solve": Q.solve(X),
            "inverse_diagonal": Q.inverse_diagonal(),
            "congruence": Q.inv_congruence(rows),
            "congruence diagonal": Q.inv_congruence_diagonal(rows),
        }
        for name, answer in found.items():
            yield differing(f"{name}, 2^{exponent}", answer, answers[name] / c)
        b = sides["random"][..., 0]
        yield differing(f"inv_quad, 2^{exponent}", Q.inv_quad(b), P.inv_quad(b) / c)
        yield differing(f"(2^{exponent} P) @ X", Q @ X, multiplied * c)
        yield differing(f"diagonal of 2^{exponent} P", Q.diagonal(), diagonal * c)
        gap = Q.logdet().double() - logdet - case.size * exponent * math.log(2.0)
        limit = 4 * (eps(case) + case.size * EPS64) * (logs + case.size * abs(exponent))
        yield worst(f"logdet, 2^{exponent}", gap.abs(), limit)
    yield from _one_scale_each(case, X)
    shape = (2, *case.batch_shape, case.size)
    z = torch.randn(shape, dtype=torch.float64, generator=case.generator(23)).to(case.dtype)
    roots = (P.unwhiten(z), P.whiten(z), P.root_matvec(z), P.root_solve(z))
    drawn = P.sample((2,), generator=torch.Generator().manual_seed(9))
    for exponent in (20, -20):
        Q, s = (4.0**exponent * P).factor(), 2.0**exponent
        yield differing(f"unwhiten, 4^{exponent}", Q.unwhiten(z), roots[0] / s)
        yield differing(f"whiten, 4^{exponent}", Q.whiten(z), roots[1] * s)
        yield differing(f"root_matvec, 4^{exponent}", Q.root_matvec(z), roots[2] * s)
        yield differing(f"root_solve, 4^{exponent}", Q.root_solve(z), roots[3] / s)
        scaled = Q.sample((2,), generator=torch.Generator().manual_seed(9))
        yield differing(f"sample, 4^{exponent}", scaled, drawn / s)


def _one_scale_each(case: Case, X: Tensor) -> Iterator[Measurement]:
    """A scale for each element of the batch; an operator without batch gets one."""
    batch = case.batch_shape or torch.Size([3])
    c = torch.pow(2.0, torch.arange(batch.numel(), dtype=torch.float64)).reshape(batch).to(case.dtype)
    P, Q = case.operator, c * case.operator
    yield claim("batch of a scaled operator", Q.batch_shape == batch)
    yield claim("type of a scaled operator", type(Q) is type(P))
    columns = c[..., None, None]
    gap, size = norms(Q @ X - columns * (P @ X)), norms(columns * X)
    yield worst("(c P) @ X, a scale each", gap, 2 * product(case) * case.norm.unsqueeze(-1) * size)
    solved = P.solve(X) / columns
    gap = norms(Q.solve(X) - solved) / norms(solved)
    limit = torch.as_tensor(2 * (forward(case) + eps(case)))
    yield from worst_counted("(c P).solve(X), a scale each", gap, limit, torch.ones(()))
