"""ResNet-20 on CIFAR-10: does a Laplace approximation mend the calibration of a trained network?

    python benchmarks/calibration.py [--data-dir DIR] [--splits 5] [--results docs/results]

Only test images are at hand, so of each split of them 5,000 give the curvature (the GGN needs no labels; it is scaled
to the 50,000 images of training), 1,000 the prior precision, by their NLL, and 4,000 the scores. The evidence is not
quoted: it is that of other images than the network was trained on. Splits are of the same 10,000 images: their standard
errors are those of the split, not of the network, which is one.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _models import cifar10_test, resnet20
from curvlin_nn import Laplace, metrics

N_TRAIN, N_CURVATURE, N_TUNING = 50_000, 5_000, 1_000
CHOICES = (("last_layer", "kron"), ("all", "kron"))

Row = dict[str, float]

PAGE = """\
# A trained network, its calibration mended

ResNet-20 on CIFAR-10, with trained weights that are public (270 thousand of them), by

    python benchmarks/calibration.py --data-dir DIR --splits {n}

which writes this page from one file for each split.

{about}

Seconds are of the processor, on one thread. A cell is a mean over splits ± its standard error; differences are of the
same split.

{table}
"""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    folder = options.results / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    model, data = resnet20(options.data_dir), cifar10_test(options.data_dir)
    for split in range(options.splits):
        path = folder / f"split{split}.json"
        if path.exists():
            continue
        found = evaluated(model, *data, split)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"split {split}: " + ", ".join(f"{name} {row['NLL']:.4f}" for name, row in found.items()))
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("split*.json"))]
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    text = PAGE.format(n=len(results), about="\n".join(textwrap.wrap(about, 120)), table=table(results))
    (options.results / "calibration.md").write_text(text)
    print("\n" + table(results))


def evaluated(model: nn.Module, x: Tensor, y: Tensor, split: int) -> dict[str, Row]:
    """The scores of the network and of its posteriors on one split."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    curvature, tuning, test = order.tensor_split([N_CURVATURE, N_CURVATURE + N_TUNING])
    rows = {"MAP": scores(probabilities(model, x[test]), y[test])}
    for weights, structure in CHOICES:
        started = time.process_time()
        la = Laplace(model, "classification", weights, structure, temperature=N_CURVATURE / N_TRAIN)
        la.fit(DataLoader(TensorDataset(x[curvature], y[curvature]), batch_size=50))
        validation = DataLoader(TensorDataset(x[tuning], y[tuning]), batch_size=250)
        la.optimize_prior_precision(method="gridsearch", val_loader=validation, log_prior_prec_max=5)
        fitted = time.process_time()
        p = torch.cat([la(part) for part in x[test].split(250)])  # type: ignore[misc]
        seconds = {"fit, s": fitted - started, "predict, s": time.process_time() - fitted}
        row = scores(p, y[test]) | {"prior precision": float(la.prior_precision)} | seconds  # type: ignore[arg-type]
        rows[f"{weights.replace('_', ' ')}, {structure}"] = row
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("CURVLIN_DATA"))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "docs" / "results")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set CURVLIN_DATA")
    options.data_dir = Path(options.data_dir)
    return options


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part).softmax(-1) for part in x.split(500)])


def scores(p: Tensor, y: Tensor) -> Row:
    """NLL in nats, ECE (15 bins), accuracy."""
    return {
        "NLL": float(metrics.nll(p, y)),
        "ECE %": 100 * float(metrics.ece(p, y)),
        "accuracy %": 100 * float(metrics.accuracy(p, y)),
    }


def table(results: list[dict[str, Row]]) -> str:
    """Means with standard errors over the splits; differences to MAP are of the same split."""
    scored = {"NLL": 4, "ECE %": 2, "accuracy %": 2}
    compared = {"NLL": 4, "ECE %": 2}
    costs = ("prior precision", "fit, s", "predict, s")
    lines = [["", *scored, *(f"{name} - MAP" for name in compared), *costs]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for name in results[0]:
        rows, of_map = [r[name] for r in results], [r["MAP"] for r in results]
        cells = [cell([r[column] for r in rows], digits) for column, digits in scored.items()]
        for column, digits in compared.items():
            cells.append(cell([r[column] - m[column] for r, m in zip(rows, of_map, strict=True)], digits))
        cells += ["" if name == "MAP" else f"{mean(r[column] for r in rows):.3g}" for column in costs]
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(values: list[float], digits: int) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


if __name__ == "__main__":
    main()
