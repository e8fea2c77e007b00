"""One-dimensional regression: four posteriors of one network, prior precision and noise from the evidence.

python examples/regression.py [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import _pictures as pictures
from curvlin_nn import Laplace, plots

CHOICES = (("all", "full"), ("all", "kron"), ("all", "diag"), ("last_layer", "full"))


def truth(x: Tensor) -> Tensor:
    return torch.sin(1.5 * x) + 0.3 * x


def make_data(n: int = 80, noise: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clusters of noisy observations with nothing in between."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator) * 2
    x = torch.where(torch.arange(n)[:, None] % 2 == 0, x - 3.5, x + 1.0)
    return x, truth(x) + noise * torch.randn(n, 1, generator=generator)


def train(x: Tensor, y: Tensor, steps: int = 2000, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimiser.step()
    return model


def draw(path: Path) -> None:
    """Train, fit the four posteriors, draw their bands."""
    x, y = make_data()
    model = train(x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    grid = torch.linspace(-5.5, 5.5, 300)[:, None]
    with pictures.grid_of_axes(path, rows=2, columns=2) as axes:
        for axis, (weights, structure) in zip(axes, CHOICES, strict=True):
            la = Laplace(model, "regression", subset_of_weights=weights, hessian_structure=structure)
            la.fit(loader)
            la.optimize_prior_precision(optimize_noise=True)
            mean, variance = la(grid)
            sigma = float(la.sigma_noise)
            plots.predictive_band(grid, mean, variance, sigma**2, data=(x, y), ax=axis)
            axis.plot(grid, truth(grid), color="#8a8f98", lw=1.2, ls="--", label="truth")
            log_z = float(la.log_marginal_likelihood())
            name = weights.replace("_", " ")
            axis.set_title(f"{name}, {structure}   (noise {sigma:.2f}, log Z {log_z:.1f})")
            axis.set(xlim=(-5.5, 5.5), ylim=(-6, 6))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One-dimensional regression bands.")
    parser.add_argument("--out", type=Path, default=Path("demo_out/regression.png"))
    draw(parser.parse_args().out)
