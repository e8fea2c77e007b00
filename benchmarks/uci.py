"""Regression on UCI data with prior and noise tuned by the evidence, beside laplace-torch.

    python benchmarks/uci.py --data-dir DATA [--datasets yacht energy concrete power-plant] [--splits 20]

DATA holds ``uci/NAME/data.txt`` (default: the folder of CURVLIN_DATA), whose last used column is the target. The splits
are the standard ones: 90 % for training, drawn in order from ``numpy.random.RandomState(1)``. Inputs and targets are
standardised; results are in the units of the targets.

One network with one hidden layer of 50 tanh units is trained for each split, twice: at prior precision 1 and the noise
of its residuals, and again at the hyperparameters that have the largest evidence around the first. Both libraries then
take this network and its full curvature over all weights, in float64. Ours finds prior precision (for each parameter
tensor, and one for all) and noise by `optimize_prior_precision(optimize_noise=True)`; laplace-torch, without a search
with noise in it, by L-BFGS on its differentiable `log_marginal_likelihood` until the gradient is below 1e-6 of the
number of data. Its network and therefore the RMSE are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlin_nn import Laplace

DATASETS = {"yacht": 6, "energy": 8, "concrete": 8, "power-plant": 4}
"""The column of the target; inputs stand before it."""

STRUCTURES = ("scalar", "layerwise")


def splits(folder: Path, name: str, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Training and test inputs and targets of each split."""
    data = np.loadtxt(folder / "uci" / name / "data.txt")
    column, n = DATASETS[name], len(data)
    x, y = (torch.from_numpy(part.copy()) for part in (data[:, :column], data[:, column : column + 1]))
    rng = np.random.RandomState(1)
    for _ in range(count):
        order = torch.from_numpy(rng.choice(range(n), n, replace=False))
        train, test = order[: round(0.9 * n)], order[round(0.9 * n) :]
        yield x[train], y[train], x[test], y[test]


def trained(x: Tensor, y: Tensor, seed: int, steps: int) -> nn.Module:
    """At the mode of the prior that has the largest evidence around an earlier mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 50), nn.Tanh(), nn.Linear(50, 1)).double()
    precision, sigma = torch.ones((), dtype=torch.float64), None
    for _ in range(2):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            optimiser.zero_grad()
            squares = (model(x) - y).square().mean()
            variance = float(squares.detach()) if sigma is None else sigma**2
            scatter = sum(p.square().sum() for p in model.parameters())
            (squares + precision * variance * scatter / len(x)).backward()
            optimiser.step()
            schedule.step()
        la = Laplace(model, "regression", "all", "full", sigma_noise=variance**0.5).fit([(x, y)])
        la.optimize_prior_precision(optimize_noise=True)
        precision, sigma = la.prior_precision, float(la.sigma_noise)
    return model


def ours(model: nn.Module, x: Tensor, y: Tensor, structure: str) -> tuple[Any, float]:
    la = Laplace(model, "regression", "all", "full").fit([(x, y)])
    optimum = la.optimize_prior_precision(prior_structure=structure, optimize_noise=True)
    return la, optimum.log_marginal_likelihood


def peer(model: nn.Module, x: Tensor, y: Tensor, structure: str) -> tuple[Any, float]:
    import laplace

    la = laplace.Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    n_groups = 1 if structure == "scalar" else len(list(model.parameters()))
    logs = torch.zeros(n_groups + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logs],
        max_iter=500,
        tolerance_grad=1e-6 * len(x),
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = -la.log_marginal_likelihood(logs[:-1].exp(), logs[-1].exp())
        value.backward()
        return value

    optimiser.step(loss)
    la.prior_precision, la.sigma_noise = logs[:-1].detach().exp(), logs[-1].detach().exp()
    return la, -float(loss())


def nll(la: Any, x: Tensor, y: Tensor) -> float:
    """The mean over samples, in standardised units."""
    mean, covariance = la(x)
    variance = covariance.flatten() + float(la.sigma_noise) ** 2
    squares = (y - mean).flatten().square() / variance
    return float(((2 * math.pi * variance).log() + squares).mean() / 2)


def evaluate(folder: Path, name: str, count: int, steps: int, with_peer: bool) -> list[dict[str, float]]:
    found = []
    for number, (x, y, x_test, y_test) in enumerate(splits(folder, name, count)):
        scale = x.std(0, correction=0)
        scale[scale == 0] = 1
        shift, spread, centre = x.mean(0), float(y.std(correction=0)), float(y.mean())
        x, x_test = (x - shift) / scale, (x_test - shift) / scale
        y, y_test = (y - centre) / spread, (y_test - centre) / spread
        model = trained(x, y, number, steps)
        rmse = float((model(x_test).detach() - y_test).square().mean().sqrt()) * spread
        row = {"RMSE": rmse}
        libraries = {"curvlin": ours, "laplace-torch": peer} if with_peer else {"curvlin": ours}
        for structure in STRUCTURES:
            for library, fit in libraries.items():
                start = time.perf_counter()
                la, evidence = fit(model, x, y, structure)
                key = f"{library}, {structure}"
                row[f"{key}: seconds"] = time.perf_counter() - start
                row[f"{key}: NLL"] = nll(la, x_test, y_test) + math.log(spread)
                row[f"{key}: evidence"] = evidence
        found.append(row)
        print(f"{name} split {number}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
    return found


def summary(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard error of each column."""
    columns = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]}
    error = max(1, len(rows) - 1) ** 0.5
    return {key: (float(v.mean()), float(v.std(correction=0)) / error) for key, v in columns.items()}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data-dir", type=Path, default=os.environ.get("CURVLIN_DATA"))
    options.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    options.add_argument("--splits", type=int, default=20)
    options.add_argument("--steps", type=int, default=1000, help="steps of each training (default 1000)")
    options.add_argument("--json", type=Path, help="also write the rows here")
    chosen = options.parse_args()
    if chosen.data_dir is None:
        options.error("--data-dir or CURVLIN_DATA must name a folder")
    warnings.simplefilter("ignore")
    with_peer = importlib.util.find_spec("laplace") is not None
    rows = {}
    for name in chosen.datasets:
        rows[name] = evaluate(Path(chosen.data_dir), name, chosen.splits, chosen.steps, with_peer)
        print(f"\n{name}, {chosen.splits} splits, mean and standard error")
        for key, (mean, error) in summary(rows[name]).items():
            print(f"  {key:36s}{mean:12.4f} +- {error:.4f}")
        print(flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
