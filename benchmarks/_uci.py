"""Small regressions: the UCI data in standard splits, a network trained to the mode of its prior, and its score."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlin_nn import Laplace

DATASETS = {"yacht": 6, "energy": 8, "concrete": 8, "power-plant": 4}
"""The column of the target; inputs stand before it."""

Row = dict[str, float]


@dataclass(frozen=True)
class Split:
    """Inputs and targets, standardised by those of the training data.

    Attributes:
        x: of the training data; so is y.
        x_test: of the test data; so is y_test.
        spread: the standard deviation of the training targets, in their units.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    spread: float


def splits(folder: Path, name: str, count: int) -> Iterator[Split]:
    """The standard ones: 90 % for training, drawn in order from ``numpy.random.RandomState(1)``."""
    x, y = _table(folder, name)
    rng = np.random.RandomState(1)
    for _ in range(count):
        order = torch.from_numpy(rng.choice(range(len(x)), len(x), replace=False))
        cut = round(0.9 * len(x))
        yield _standardised(x, y, order[:cut], order[cut:])


def gaps(folder: Path, name: str) -> Iterator[Split]:
    """One for each input: the third of the data in its middle is for testing (Foong et al., 2019)."""
    x, y = _table(folder, name)
    for column in x.unbind(1):
        order = column.argsort(stable=True)
        third = len(x) // 3
        yield _standardised(x, y, torch.cat([order[:third], order[-third:]]), order[third:-third])


def _table(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    data = np.loadtxt(folder / "uci" / name / "data.txt")
    column = DATASETS[name]
    x, y = (torch.from_numpy(part.copy()) for part in (data[:, :column], data[:, column : column + 1]))
    return x, y


def _standardised(x: Tensor, y: Tensor, train: Tensor, test: Tensor) -> Split:
    scale, shift = x[train].std(0, correction=0), x[train].mean(0)
    scale[scale == 0] = 1
    spread, centre = float(y[train].std(correction=0)), float(y[train].mean())
    x, y = (x - shift) / scale, (y - centre) / spread
    return Split(x[train], y[train], x[test], y[test], spread)


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


def rmse(model: nn.Module, split: Split) -> float:
    """In the units of the targets."""
    return float((model(split.x_test).detach() - split.y_test).square().mean().sqrt()) * split.spread


def nll(mean: Tensor, variance: Tensor, split: Split) -> float:
    """The mean over the test data, in the units of the targets; the variance is that of targets."""
    squares = (split.y_test - mean).square() / variance
    return float(((2 * math.pi * variance).log() + squares).mean() / 2) + math.log(split.spread)


def summary(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Mean and standard error of each column."""
    columns = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]}
    error = max(1, len(rows) - 1) ** 0.5
    return {key: (float(v.mean()), float(v.std(correction=0)) / error) for key, v in columns.items()}


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that every run has; `doc` describes the script."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", type=Path, default=os.environ.get("CURVLIN_DATA"))
    options.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    options.add_argument("--splits", type=int, default=20)
    options.add_argument("--steps", type=int, default=1000, help="steps of each training (default 1000)")
    options.add_argument("--json", type=Path, help="also write the rows here")
    return options


def folder_of(options: argparse.ArgumentParser, chosen: Any) -> Path:
    """The folder of the data; ends with the usage if there is none."""
    if chosen.data_dir is None:
        options.error("--data-dir or CURVLIN_DATA must name a folder")
    return Path(chosen.data_dir)


def report(
    name: str, tried: Iterator[Split], steps: int, evaluate: Callable[[nn.Module, Split, int], Row]
) -> list[Row]:
    """Train and evaluate on each split; prints every row, and the means with their standard errors."""
    rows = []
    for number, split in enumerate(tried):
        row = evaluate(trained(split.x, split.y, number, steps), split, number)
        print(f"{name} split {number}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
        rows.append(row)
    print(f"\n{name}, {len(rows)} splits, mean and standard error")
    for key, (mean, error) in summary(rows).items():
        print(f"  {key:36s}{mean:12.4f} +- {error:.4f}")
    print(flush=True)
    return rows


def write(path: Path | None, rows: dict[str, list[Row]]) -> None:
    """The rows of every data set, if they are asked for."""
    if path:
        path.write_text(json.dumps(rows, indent=2))
