"""Speed and accuracy of operators beside linear_operator, in one run: ours / theirs.

    python benchmarks/operators.py [--repeats 5] [--threads N] [--small]

Two problems with exact answers in both libraries: a Kronecker product of 512 x 512 and 256 x 256 factors plus a
multiple of the identity (131,072 rows), and a diagonal plus 100 low-rank columns (200,000 rows). Timed are
``inv_quad + logdet``, the same with gradients with respect to everything, and ten samples; each with a new
operator, factored once, as in an optimisation loop, the best of several repeats, ours and theirs taking turns. Errors
are relative, against float64 closed forms of the same (rounded) inputs. "variance" is the energy of the samples over
what it should be, for the low-rank problem outside of the range of U, where only the diagonal contributes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

try:
    import curvlin  # noqa: F401
except ImportError:  # run from a checkout, in an environment that has the peer only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

from linear_operator.operators import (  # noqa: E402
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LowRankRootLinearOperator,
)

from curvlin import KroneckerSum, LowRankPlusDiag  # noqa: E402

Values = tuple[Tensor, Tensor]
SAMPLES = 10


@dataclass(frozen=True)
class Problem:
    """Inputs, both libraries' operators on them, and the exact answers."""

    name: str
    inputs: tuple[Tensor, ...]
    b: Tensor
    ours: Callable[..., object]
    theirs: Callable[..., object]
    inv_quad: float
    logdet: float
    gradients: tuple[Tensor, ...]
    variance: Callable[[Tensor], float]


def ours_value(P: object, b: Tensor) -> Values:
    P = P.factor()  # type: ignore[attr-defined]
    return P.inv_quad(b), P.logdet()


def theirs_value(P: object, b: Tensor) -> Values:
    quad, logdet = P.inv_quad_logdet(b.unsqueeze(-1), logdet=True)  # type: ignore[attr-defined]
    return quad.squeeze(), logdet.squeeze()


def ours_samples(P: object) -> Tensor:
    """Draws of N(0, P), which is what the peer offers."""
    size = P.size  # type: ignore[attr-defined]
    return P.root_matvec(torch.randn(SAMPLES, size, dtype=P.dtype))  # type: ignore[attr-defined]


def theirs_samples(P: object) -> Tensor:
    return P.zero_mean_mvn_samples(SAMPLES)  # type: ignore[attr-defined]


# -- problems ------------------------------------------------------------------------------------------------------


def kronecker(dtype: torch.dtype, a: int, b: int) -> Problem:
    """``A (x) B + delta I`` with factors as K-FAC makes them: Gram matrices of decaying features."""
    g = torch.Generator().manual_seed(0)

    def factor(n: int) -> Tensor:
        X = torch.randn(2 * n, n, dtype=torch.float64, generator=g) * torch.logspace(
            0, -2, n, dtype=torch.float64
        )
        return (X.mT @ X / (2 * n)).to(dtype)

    A, B, delta = factor(a), factor(b), torch.tensor(1e-2, dtype=dtype)
    x = torch.randn(a * b, dtype=torch.float64, generator=g).to(dtype)
    A64, B64, d64, x64 = (t.double().requires_grad_() for t in (A, B, delta, x))
    (la, U), (lb, V) = torch.linalg.eigh(A64.detach()), torch.linalg.eigh(B64.detach())
    spectrum = la[:, None] * lb + d64.detach()
    solution = U @ ((U.mT @ x64.detach().view(a, b) @ V) / spectrum) @ V.mT
    quad, logdet = float((x64.detach().view(a, b) * solution).sum()), float(spectrum.log().sum())
    # d logdet / dA = U diag(sum_j b_j / d_ij) U^T, d quad / dA = -X B X^T; likewise for B; traces for delta.
    dA = (U * (lb / spectrum).sum(1)) @ U.mT - solution @ B64.detach() @ solution.mT
    dB = (V * (la[:, None] / spectrum).sum(0)) @ V.mT - solution.mT @ A64.detach() @ solution
    dd = (1 / spectrum).sum() - solution.square().sum()
    variance = (A64.detach().diagonal()[:, None] * B64.detach().diagonal() + d64.detach()).flatten()
    return Problem(
        f"Kronecker {a} (x) {b} + delta I",
        (A, B, delta),
        x,
        KroneckerSum.shifted,
        lambda A, B, delta: (
            KroneckerProductLinearOperator(DenseLinearOperator(A), DenseLinearOperator(B))
            + ConstantDiagLinearOperator(delta.unsqueeze(-1), a * b)
        ),
        quad,
        logdet,
        (dA, dB, dd, 2 * solution.flatten()),
        lambda samples: float((samples.square() / variance).mean()),
    )


def low_rank(dtype: torch.dtype, n: int, k: int) -> Problem:
    """``diag(d) + U U^T``."""
    g = torch.Generator().manual_seed(1)
    d = (0.5 + torch.rand(n, dtype=torch.float64, generator=g)).to(dtype)
    U = torch.randn(n, k, dtype=torch.float64, generator=g).to(dtype)
    x = torch.randn(n, dtype=torch.float64, generator=g).to(dtype)
    d64, U64, x64 = d.double(), U.double(), x.double()
    # A thin QR of [D^(-1/2) U; I] gives every answer without a squared condition.
    V = U64 / d64.sqrt().unsqueeze(-1)
    Q, R = torch.linalg.qr(torch.cat([V, torch.eye(k, dtype=torch.float64)]))
    H = Q[:n]
    r = x64 / d64.sqrt()
    solution = (r - H @ (H.mT @ r)) / d64.sqrt()
    logdet = float(d64.log().sum() + 2 * R.diagonal().abs().log().sum())
    weights = torch.linalg.solve_triangular(R, (H.mT @ r).unsqueeze(-1), upper=True).squeeze(-1)  # U^T P^-1 x
    inverse_diagonal = (1 - H.square().sum(-1)) / d64
    inverse_U = torch.linalg.solve_triangular(R.mT, H, upper=False, left=False).div(d64.sqrt().unsqueeze(-1))
    basis = torch.linalg.qr(U64)[0]
    expected = float(d64.sum() - (basis.square() * d64.unsqueeze(-1)).sum())

    def variance(samples: Tensor) -> float:
        outside = samples - (samples @ basis) @ basis.mT
        return float(outside.square().sum(-1).mean()) / expected

    return Problem(
        f"diagonal + low rank, {n:,} x {k}",
        (d, U),
        x,
        LowRankPlusDiag,
        lambda d, U: LowRankRootLinearOperator(U) + DiagLinearOperator(d),
        float(x64 @ solution),
        logdet,
        (
            inverse_diagonal - solution.square(),
            2 * inverse_U - 2 * torch.outer(solution, weights),
            2 * solution,
        ),
        variance,
    )


# -- measuring -----------------------------------------------------------------------------------------------------


def best(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least seconds of each, taking turns after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 1):
        for call, seconds in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            if i:
                seconds.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def with_gradients(
    make: Callable[..., object], value: Callable[[object, Tensor], Values], problem: Problem
) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (*problem.inputs, problem.b)]
        quad, logdet = value(make(*leaves[:-1]), leaves[-1])
        return torch.autograd.grad(quad + logdet, leaves)

    return run


def relative(found: Tensor, exact: Tensor | float) -> float:
    exact = torch.as_tensor(exact, dtype=torch.float64)
    return float((found.double() - exact).norm() / exact.norm())


def measure(problem: Problem, repeats: int) -> None:
    dtype = str(problem.b.dtype).removeprefix("torch.")
    sides = ((problem.ours, ours_value, ours_samples), (problem.theirs, theirs_value, theirs_samples))
    values, gradients, samples = [], [], []
    for make, value, draw in sides:
        values.append(lambda make=make, value=value: value(make(*problem.inputs), problem.b))
        gradients.append(with_gradients(make, value, problem))
        samples.append(lambda make=make, draw=draw: draw(make(*problem.inputs)))
    with torch.no_grad():
        rows = [("inv_quad + logdet", best(*values, repeats), [_value_error(v(), problem) for v in values])]
    rows.append(
        ("  + gradients", best(*gradients, repeats), [_gradient_error(g(), problem) for g in gradients])
    )
    with torch.no_grad():
        drawn = [_variance(s(), problem) for s in samples]
        rows.append((f"{SAMPLES} samples of N(0, P)", best(*samples, max(1, repeats // 2)), drawn))
    for what, (mine, peer), (my_error, peer_error) in rows:
        print(
            f"| {problem.name} | {dtype} | {what} | {mine:.4f} | {peer:.4f} | **{mine / peer:.3f}** "
            f"| {my_error} | {peer_error} |"
        )
    P = problem.ours(*problem.inputs)
    with torch.no_grad():
        start = time.perf_counter()
        P.sample((SAMPLES,))  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
    print(
        f"| {problem.name} | {dtype} | {SAMPLES} samples of N(0, P^-1) | {seconds:.4f} | not offered | - | | |"
    )


def _value_error(values: Values, problem: Problem) -> str:
    quad, logdet = values
    return f"{relative(quad, problem.inv_quad):.0e}, {relative(logdet, problem.logdet):.0e}"


def _gradient_error(gradients: tuple[Tensor, ...], problem: Problem) -> str:
    return f"{max(relative(g, exact) for g, exact in zip(gradients, problem.gradients, strict=True)):.0e}"


def _variance(samples: Tensor, problem: Problem) -> str:
    return f"variance x {problem.variance(samples.double()):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="sizes for a quick look")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, linear_operator {importlib.metadata.version('linear_operator')}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, best of {arguments.repeats}\n"
    )
    print("| problem | dtype | work | ours (s) | linear_operator (s) | ratio | our error | their error |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float64):
        measure(kronecker(dtype, *((64, 32) if arguments.small else (512, 256))), arguments.repeats)
        measure(low_rank(dtype, *((5_000, 20) if arguments.small else (200_000, 100))), arguments.repeats)


if __name__ == "__main__":
    main()
