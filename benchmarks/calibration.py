"""ResNet-20 on CIFAR-10: does a Laplace approximation mend the calibration of a trained network?

    python benchmarks/calibration.py [--data-dir DIR] [--splits 5]

Only test images are at hand, so of each split of them 5,000 give the curvature (the GGN needs no labels; it is scaled
to the 50,000 images of training), 1,000 the prior precision, by their NLL, and 4,000 the scores. The evidence is not
quoted: it is that of other images than the network was trained on. Splits are of the same 10,000 images: their standard
errors are those of the split, not of the network, which is one.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _models import cifar10_test, resnet20
from curvlin_nn import Laplace, metrics

N_TRAIN, N_CURVATURE, N_TUNING = 50_000, 5_000, 1_000
CHOICES = (("last_layer", "kron"), ("all", "kron"))


def main() -> None:
    options = parse_arguments()
    model, (x, y) = resnet20(options.data_dir), cifar10_test(options.data_dir)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for split in range(options.splits):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
        curvature, tuning, test = order.tensor_split([N_CURVATURE, N_CURVATURE + N_TUNING])
        of_the_mode = scores(probabilities(model, x[test]), y[test])
        rows.setdefault("MAP", []).append((*of_the_mode, 0.0, 0.0, 0.0))
        for weights, structure in CHOICES:
            started = time.perf_counter()
            la = Laplace(model, "classification", weights, structure, temperature=N_CURVATURE / N_TRAIN)
            la.fit(DataLoader(TensorDataset(x[curvature], y[curvature]), batch_size=50))
            validation = DataLoader(TensorDataset(x[tuning], y[tuning]), batch_size=250)
            la.optimize_prior_precision(method="gridsearch", val_loader=validation, log_prior_prec_max=5)
            fitted = time.perf_counter()
            found = scores(torch.cat([la(part) for part in x[test].split(250)]), y[test])  # type: ignore[misc]
            predicted = time.perf_counter()
            row = (*found, float(la.prior_precision), fitted - started, predicted - fitted)  # type: ignore[arg-type]
            rows.setdefault(f"{weights.replace('_', ' ')}, {structure}", []).append(row)
        print(
            f"split {split + 1} of {options.splits}: "
            + ", ".join(f"{n} {r[-1][0]:.4f}" for n, r in rows.items())
        )
    print("\n" + table(rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("CURVLIN_DATA"))
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set CURVLIN_DATA")
    options.data_dir = Path(options.data_dir)
    return options


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part).softmax(-1) for part in x.split(500)])


def scores(p: Tensor, y: Tensor) -> tuple[float, float, float]:
    """NLL in nats, ECE (15 bins), accuracy."""
    return float(metrics.nll(p, y)), float(metrics.ece(p, y)), float(metrics.accuracy(p, y))


def table(rows: dict[str, list[tuple[float, ...]]]) -> str:
    """Means with standard errors over the splits; differences to MAP are of the same split."""
    of_map = torch.tensor(rows["MAP"])
    lines = [
        "|  | NLL | ECE % | accuracy % | NLL less MAP's | ECE less MAP's, % | prior precision | fit s | predict s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        r = torch.tensor(found)
        difference = r - of_map
        precision = f"{r[:, 3].log().mean().exp():.3g}" if name != "MAP" else ""
        cells = [name, cell(r[:, 0], 4), cell(100 * r[:, 1], 2), cell(100 * r[:, 2], 2)]
        cells += [cell(difference[:, 0], 4), cell(100 * difference[:, 1], 2), precision]
        lines.append("| " + " | ".join([*cells, f"{r[:, 4].mean():.0f}", f"{r[:, 5].mean():.0f}"]) + " |")
    return "\n".join(lines)


def cell(values: Tensor, digits: int) -> str:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return f"{float(values.mean()):.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    main()
