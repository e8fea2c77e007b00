"""Normals of 131,072 coordinates beside gpytorch's own, on the same numbers and in one run: ours / theirs.

    python benchmarks/normals.py [--repeats 5] [--threads 2] [--small]

The covariance is ``A (x) B + delta I`` with 512 x 512 and 256 x 256 factors, added in the order for which gpytorch has
an exact structured path. Each timing is the least of several, ours and theirs taking turns, on a distribution that is
built anew and so factorised anew. Before it is timed, ours runs under `forbid_dense`: a tensor of more than 4 times
the elements of the inputs and outputs is an error. gpytorch's entropy and divergence multiply out ``D x D`` matrices
(137 GB here), and are run with ``--small`` only. Errors are relative to float64 closed forms, the largest over the
tensors of an answer; the row ``F F^T x`` is the root that makes samples, times its transpose, beside ``C x``. The last
column is the same question to a normal held by a precision of that form, which gpytorch does not offer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

from gpytorch.distributions import MultivariateNormal  # noqa: E402
from linear_operator.operators import (  # noqa: E402
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    KroneckerProductLinearOperator,
)

from curvlin import Covariance, KroneckerSum  # noqa: E402
from curvlin.interop.gpytorch import StructuredMVN  # noqa: E402
from curvlin.testing import forbid_dense  # noqa: E402

BAR = 1.0
"""Seconds that log_prob, ten samples and a divergence may take, each."""
DENSE = 4096
"""Rows up to which gpytorch may multiply a matrix out here."""

Make = Callable[[Tensor, Tensor, Tensor, Tensor], MultivariateNormal]


def ours(mean: Tensor, A: Tensor, B: Tensor, delta: Tensor) -> StructuredMVN:
    return StructuredMVN(mean, Covariance.of(KroneckerSum.shifted(A, B, delta)))


def by_precision(mean: Tensor, A: Tensor, B: Tensor, delta: Tensor) -> StructuredMVN:
    """The inverse of the same matrix as the covariance: the cost of a posterior held by its precision."""
    return StructuredMVN(mean, KroneckerSum.shifted(A, B, delta))


def theirs(mean: Tensor, A: Tensor, B: Tensor, delta: Tensor) -> MultivariateNormal:
    product = KroneckerProductLinearOperator(DenseLinearOperator(A), DenseLinearOperator(B))
    return MultivariateNormal(mean, product + ConstantDiagLinearOperator(delta.unsqueeze(-1), mean.shape[-1]))


@dataclass(frozen=True)
class Work:
    """One question: how to ask it, the right answer, and whether gpytorch makes a dense matrix of it."""

    name: str
    ask: Callable[[Make], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...] = ()
    dense_in_gpytorch: bool = False


def factor(n: int, generator: torch.Generator) -> Tensor:
    """As K-FAC makes them: Gram matrices of decaying features."""
    X = torch.randn(2 * n, n, dtype=torch.float64, generator=generator)
    X = X * torch.logspace(0, -2, n, dtype=torch.float64)
    return X.mT @ X / (2 * n)


def problem(a: int, b: int) -> tuple[list[Work], int]:
    """The questions, and how many elements a tensor may have."""
    g = torch.Generator().manual_seed(0)
    A, B, delta = factor(a, g), factor(b, g), torch.tensor(1e-2, dtype=torch.float64)
    mean, other, x = torch.randn(3, a * b, dtype=torch.float64, generator=g)
    noise = torch.randn(10, a * b, dtype=torch.float64, generator=g)
    (la, U), (lb, V) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    kron = la[:, None] * lb
    d, e = kron + delta, kron + 2 * delta
    white = U.mT @ (x - mean).view(a, b) @ V
    log_det = d.log().sum()
    n = a * b

    def rotated(values: Tensor, z: Tensor) -> Tensor:
        return (U @ (values * (U.mT @ z.view(-1, a, b) @ V)) @ V.mT).flatten(-2)

    def log_prob(make: Make) -> tuple[Tensor, ...]:
        return (make(mean, A, B, delta).log_prob(x),)

    def gradients(make: Make) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (mean, A, B, delta)]
        return torch.autograd.grad(make(*leaves).log_prob(x), leaves)

    def samples(make: Make) -> tuple[Tensor, ...]:
        return (make(mean, A, B, delta).rsample(torch.Size((10,)), base_samples=noise),)

    def root(make: Make) -> tuple[Tensor, ...]:
        R = make(torch.zeros_like(mean), A, B, delta).lazy_covariance_matrix.root_decomposition().root
        return (R.matmul(R.mT.matmul(x[:, None])).squeeze(-1),)

    def entropy(make: Make) -> tuple[Tensor, ...]:
        return (make(mean, A, B, delta).entropy(),)

    def divergence(make: Make) -> tuple[Tensor, ...]:
        return (kl_divergence(make(mean, A, B, delta), make(other, A, B, 2 * delta)),)

    solved = rotated(1 / d, x - mean).view(a, b)
    dA = ((U * (lb / d).sum(1)) @ U.mT - solved @ B @ solved.mT) / -2
    dB = ((V * (la[:, None] / d).sum(0)) @ V.mT - solved.mT @ A @ solved) / -2
    dd = ((1 / d).sum() - solved.square().sum()) / -2
    apart = U.mT @ (mean - other).view(a, b) @ V
    density = -0.5 * ((white.square() / d).sum() + log_det + n * math.log(2 * math.pi))
    kl = 0.5 * ((apart.square() / e).sum() + (d / e - 1 - (d / e).log()).sum())
    works = [
        Work("log_prob", log_prob, (density,)),
        Work("  + gradients", gradients, (solved.flatten(), dA, dB, dd)),
        Work("10 samples", samples),
        Work("  F F^T x", root, (rotated(d, x).squeeze(0),)),
        Work("entropy", entropy, (0.5 * (log_det + n * (1 + math.log(2 * math.pi))),), True),
        Work("KL", divergence, (kl,), True),
    ]
    return works, 4 * max(A.numel() + B.numel() + 2 * n, noise.numel())


def least(calls: list[Callable[[], object] | None], repeats: int) -> list[float]:
    """Least seconds of each call, taking turns after one warm-up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 1):
        for call, times in zip(calls, seconds, strict=True):
            if call is None:
                continue
            start = time.perf_counter()
            call()
            if i:
                times.append(time.perf_counter() - start)
    return [min(times, default=math.nan) for times in seconds]


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
    """The largest of the relative errors, each in the norm of its tensor."""
    pairs = zip(found, exact, strict=False)
    errors = [float((f.detach() - e).norm() / e.norm()) for f, e in pairs]
    return f"{max(errors):.0e}" if errors else ""


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="64 (x) 32, where gpytorch can do everything")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    a, b = (64, 32) if arguments.small else (512, 256)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("gpytorch", "linear_operator")
    )
    print(
        f"torch {torch.__version__}, {versions}, Python {platform.python_version()}, {torch.get_num_threads()} "
        f"threads, best of {arguments.repeats}; A ({a} x {a}) (x) B ({b} x {b}) + delta I: {a * b:,} rows, float64\n"
    )
    print(
        "| work | ours (s) | gpytorch (s) | ratio | our error | gpytorch's error | ours, by precision (s) |"
    )
    print("|---|---|---|---|---|---|---|")
    works, limit = problem(a, b)
    mine_all: dict[str, float] = {}
    for work in works:
        able = not work.dense_in_gpytorch or a * b <= DENSE
        calls = [lambda w=work: w.ask(ours), (lambda w=work: w.ask(theirs)) if able else None]
        calls.append(lambda w=work: w.ask(by_precision))
        with forbid_dense(limit):
            calls[0](), calls[2]()
        mine, peer, inverse = least(calls, arguments.repeats)
        mine_all[work.name] = max(mine, inverse)
        errors = [error(call(), work.exact) if call else "" for call in calls[:2]]
        their = f"{peer:.4f} | **{mine / peer:.3f}**" if able else "forms D x D | -"
        print(f"| {work.name} | {mine:.4f} | {their} | {errors[0]} | {errors[1]} | {inverse:.4f} |")
    barred = ("log_prob", "10 samples", "KL")
    if any(mine_all[name] > BAR for name in barred):
        raise SystemExit(f"over {BAR} s: { ({name: round(mine_all[name], 2) for name in barred}) }")
    return mine_all


if __name__ == "__main__":
    main()
