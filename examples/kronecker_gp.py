"""Exact Gaussian process regression on a grid: gpytorch's kernels and likelihood, a Kronecker covariance from curvlin.

    python examples/kronecker_gp.py [--grid 40 30] [--steps 100] [--no-check]

The values at the points of an ``n1 x n2`` grid have covariance ``K1 (x) K2 + sigma^2 I``. Lengthscales, scale and noise
are learned by gradients of the exact log marginal likelihood, and predictions are exact at any point of the plane,
although a matrix of ``(n1 n2)^2`` entries is never formed. The check at the end forms it, to compare.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

import gpytorch  # noqa: E402

from curvlin import Covariance, KhatriRaoFeatures, KroneckerSum  # noqa: E402
from curvlin.interop.gpytorch import StructuredMVN  # noqa: E402

F64 = torch.float64


class GridGP(gpytorch.models.GP):
    """Values on a grid with a product kernel; a test point is a pair of coordinates."""

    def __init__(self, x1: Tensor, x2: Tensor) -> None:
        super().__init__()
        self.x1, self.x2 = x1, x2
        self.mean = gpytorch.means.ConstantMean().to(F64)
        self.kernel1 = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).to(F64)
        self.kernel2 = gpytorch.kernels.MaternKernel(nu=2.5).to(F64)

    def forward(self) -> StructuredMVN:
        """The prior over all grid points, row-major."""
        K1, K2 = self.kernel1(self.x1).to_dense(), self.kernel2(self.x2).to_dense()
        n = len(self.x1) * len(self.x2)
        mean = self.mean(self.x1[:1]).expand(n)
        return StructuredMVN(mean, Covariance.of(KroneckerSum([(K1, K2)])))

    def cross(self, x: Tensor) -> KhatriRaoFeatures:
        """``k(x, grid)``, the row of each test point being a Kronecker product of two short rows."""
        left = self.kernel1(x[:, :1], self.x1).to_dense()
        right = self.kernel2(x[:, 1:], self.x2).to_dense()
        return KhatriRaoFeatures(left[:, None, None, :], right[:, None, :])

    def variance_at(self, x: Tensor) -> Tensor:
        """``k(x, x)``."""
        return self.kernel1(x[:, :1], diag=True) * self.kernel2(x[:, 1:], diag=True)


def fit(
    model: GridGP, likelihood: gpytorch.likelihoods.GaussianLikelihood, y: Tensor, steps: int
) -> list[float]:
    """Maximise the marginal likelihood; returns its trace per data point."""
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.1)
    trace = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -mll(model(), y)  # likelihood(model()) adds sigma^2 I, and log_prob of that is exact
        loss.backward()
        optimizer.step()
        trace.append(-loss.item())
    return trace


def predict(
    model: GridGP, likelihood: gpytorch.likelihoods.GaussianLikelihood, y: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the function at test points, given y on the grid."""
    marginal = likelihood(model())
    K = marginal.gaussian.covariance.operator.factor()  # K1 (x) K2 + sigma^2 I
    Phi = model.cross(x)
    mean = model.mean(x) + (Phi @ K.solve(y - marginal.mean)).squeeze(-1)
    return mean, model.variance_at(x) - K.inv_congruence_diagonal(Phi).squeeze(-1)


def dense_reference(
    model: GridGP, likelihood: gpytorch.likelihoods.GaussianLikelihood, y: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log marginal likelihood, predictive mean and variance from the matrix itself, by Cholesky."""
    K1, K2 = model.kernel1(model.x1).to_dense(), model.kernel2(model.x2).to_dense()
    K = torch.kron(K1, K2) + likelihood.noise * torch.eye(y.numel(), dtype=F64)
    left, right = model.kernel1(x[:, :1], model.x1).to_dense(), model.kernel2(x[:, 1:], model.x2).to_dense()
    cross = (left[:, :, None] * right[:, None, :]).flatten(1)
    L = torch.linalg.cholesky(K)
    residual = y - model.mean(model.x1[:1])
    alpha = torch.cholesky_solve(residual[:, None], L).squeeze(-1)
    white = torch.linalg.solve_triangular(L, cross.mT, upper=False)
    quad = residual @ alpha + 2 * L.diagonal().log().sum() + y.numel() * math.log(2 * math.pi)
    return -quad / 2, model.mean(x) + cross @ alpha, model.variance_at(x) - white.square().sum(0)


@dataclass(frozen=True)
class Result:
    """What `main` prints."""

    trace: list[float]
    rmse: float
    coverage: float
    errors: tuple[float, float, float] | None


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, nargs=2, default=(40, 30), metavar=("N1", "N2"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--no-check", action="store_true", help="do not form the matrix to compare")
    args = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(0)
    x1 = torch.linspace(0, 1, args.grid[0], dtype=F64)[:, None]
    x2 = torch.linspace(0, 1, args.grid[1], dtype=F64)[:, None]

    def truth(a: Tensor, b: Tensor) -> Tensor:
        return torch.sin(6 * a) * torch.cos(4 * b) + 0.5 * b

    y = truth(x1, x2.mT).flatten()
    y = y + 0.1 * torch.randn(y.shape, dtype=F64, generator=generator)
    x = torch.rand(200, 2, dtype=F64, generator=generator)

    model, likelihood = GridGP(x1, x2), gpytorch.likelihoods.GaussianLikelihood().to(F64)
    begin = time.perf_counter()
    trace = fit(model, likelihood, y, args.steps)
    with torch.no_grad():
        mean, variance = predict(model, likelihood, y, x)
    seconds = time.perf_counter() - begin
    gap = mean - truth(x[:, 0], x[:, 1])
    rmse, coverage = (
        float(gap.square().mean().sqrt()),
        float((gap.abs() < 2 * variance.sqrt()).double().mean()),
    )
    print(f"{y.numel()} points, {args.steps} steps and 200 predictions in {seconds:.1f} s")
    print(f"log marginal likelihood per point: {trace[0]:.3f} -> {trace[-1]:.3f}")
    print(
        f"noise {likelihood.noise.sqrt().item():.3f} (true 0.1), rmse {rmse:.4f}, within two deviations {coverage:.0%}"
    )
    errors = None
    if not args.no_check:
        with torch.no_grad():
            exact = dense_reference(model, likelihood, y, x)
            found = likelihood(model()).log_prob(y), mean, variance
        relative = [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True)]
        errors = (relative[0], relative[1], relative[2])
        names = ("log likelihood", "mean", "variance")
        print("relative difference from the dense computation: ", end="")
        print(", ".join(f"{name} {error:.0e}" for name, error in zip(names, errors, strict=True)))
    return Result(trace, rmse, coverage, errors)


if __name__ == "__main__":
    main()
