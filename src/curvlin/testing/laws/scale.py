"""Law 6: scale equivariance, which no absolute constant survives."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.laws._law import EPS64, Measurement, differing, eps, law, worst


@law(6)
def scale(case: Case) -> Iterator[Measurement]:
    """Answers of ``c P`` are those of P times a power of c: the same bits for powers of two (roots: four)."""
    P = case.operator
    sides = right_hand_sides(case)
    b = sides["random"][..., 0]
    rows = sides["in_range"].mT
    z = torch.randn(2, *case.batch_shape, case.size, dtype=torch.float64, generator=case.generator(23)).to(
        case.dtype
    )
    for exponent in (40, -40, 7, -13):
        c = 2.0**exponent
        Q = c * P
        yield differing(f"(2^{exponent} P) @ X", Q @ sides["random"], (P @ sides["random"]) * c)
        for kind in ("random", "in_range", "in_complement"):
            X = sides[kind]
            yield differing(f"solve, 2^{exponent}, {kind}", Q.solve(X), P.solve(X) / c)
        yield differing(f"inv_quad, 2^{exponent}", Q.inv_quad(b), P.inv_quad(b) / c)
        yield differing(f"inverse_diagonal, 2^{exponent}", Q.inverse_diagonal(), P.inverse_diagonal() / c)
        yield differing(f"congruence, 2^{exponent}", Q.inv_congruence(rows), P.inv_congruence(rows) / c)
        yield differing(
            f"congruence diagonal, 2^{exponent}",
            Q.inv_congruence_diagonal(rows),
            P.inv_congruence_diagonal(rows) / c,
        )
        gap = (
            Q.logdet().double()
            - P.logdet().double()
            - case.size * exponent * torch.tensor(2.0).double().log()
        )
        logs = case.eigen[0].abs().log().abs().sum(-1) + case.size * abs(exponent)
        yield worst(f"logdet, 2^{exponent}", gap.abs(), 4 * (eps(case) + case.size * EPS64) * logs)
    for exponent in (20, -20):
        c = 4.0**exponent
        Q, s = c * P, 2.0**exponent
        yield differing(f"unwhiten, 4^{exponent}", Q.unwhiten(z), P.unwhiten(z) / s)
        yield differing(f"whiten, 4^{exponent}", Q.whiten(z), P.whiten(z) * s)
        yield differing(f"root_matvec, 4^{exponent}", Q.root_matvec(z), P.root_matvec(z) * s)
        yield differing(f"root_solve, 4^{exponent}", Q.root_solve(z), P.root_solve(z) / s)
        generators = [torch.Generator().manual_seed(9) for _ in range(2)]
        drawn, scaled = P.sample((2,), generator=generators[0]), Q.sample((2,), generator=generators[1])
        yield differing(f"sample, 4^{exponent}", scaled, drawn / s)
