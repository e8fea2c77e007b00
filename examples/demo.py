"""Train a small CNN, fit several Laplace posteriors, compare them in one table, draw four pictures.

    python examples/demo.py [--data-dir DIR] [--noise SD] [--seed N] [--out DIR]

Without --data-dir the data are scikit-learn's digits in pixel noise. DIR (or DIR/fashion-mnist) may hold the
four IDX .gz files of Fashion-MNIST; KMNIST or MNIST beside it serves as out-of-distribution data.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import _pictures as pictures
import regression
from _data import Images, digits, fashion_mnist
from curvlin_nn import Laplace, metrics

Predict = Callable[[Tensor], Tensor]
ValueT = TypeVar("ValueT")
NOISE = 0.5  # of the digits
FULL_LIMIT = 2_500  # parameters: above this the D x D matrix of "full" is not worth a demo's time


@dataclass(frozen=True)
class Row:
    """One line of the table, with the probabilities the pictures are drawn from."""

    name: str
    fit_seconds: float
    predict_seconds: float
    log_marginal_likelihood: float | None
    probabilities: Tensor
    probabilities_ood: Tensor
    accuracy: float
    nll: float
    ece: float
    brier: float
    auroc: float


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    options = parse_arguments(arguments)
    started = time.perf_counter()
    # The tensors are small: more threads would spend their time waiting for each other.
    torch.set_num_threads(1)
    if options.data_dir:
        data = fashion_mnist(options.data_dir, **({"n_train": options.images} if options.images else {}))
    else:
        data = digits(noise=options.noise, seed=options.seed)
    epochs = options.epochs or (30 if options.data_dir else 80)
    train_loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=256)

    model, seconds = timed(lambda: trained(data, epochs, options.seed))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{data.name}: {data.n_classes} classes, {len(data.x_train)} training images, "
        f"{len(data.x_test)} test images\n"
        f"out of distribution: {data.ood_name}, {len(data.x_ood)} images\n"
        f"CNN with {n_parameters} parameters, trained in {seconds:.1f} s\n"
    )

    rows = [evaluate("MAP", softmax_of(model), data, fit_seconds=seconds)]
    fitted: dict[str, Laplace] = {}
    for weights, structure in choices(n_parameters):
        name = f"{weights.replace('_', ' ')}, {structure}"
        la, seconds = timed(lambda w=weights, s=structure: fit(model, train_loader, w, s))
        row = evaluate(name, la, data, fit_seconds=seconds)
        rows.append(replace(row, log_marginal_likelihood=float(la.log_marginal_likelihood())))
        fitted[name] = la
    # The same network from the start, with the weight decay that the evidence found.
    decay = float(fitted["all, kron"].prior_precision) / len(data.x_train)
    again, seconds = timed(lambda: trained(data, epochs, options.seed, decay))
    rows.append(evaluate("MAP, tuned", softmax_of(again), data, fit_seconds=seconds))
    print(table(rows) + "\n\n" + notes(options, n_parameters, decay))

    shown = {"MAP": rows[0], "Laplace, all weights, kron": next(r for r in rows if r.name == "all, kron")}
    print(f"\n{fitted['all, kron'].describe()}")
    draw(options.out, shown, data, fitted["all, kron"])
    regression.draw(options.out / "regression.png")
    names = ", ".join(sorted(p.name for p in options.out.glob("*.png")))
    print(f"\npictures in {options.out}: {names}\ntotal {time.perf_counter() - started:.0f} s")
    return rows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST; default: digits")
    parser.add_argument("--noise", type=float, help=f"s.d. of the digits' pixel noise; default: {NOISE:g}")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the split and the training")
    parser.add_argument("--epochs", type=int, help="of training; default: 80, or 30 for Fashion-MNIST")
    parser.add_argument("--images", type=int, help="number of training images of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    if options.data_dir and options.noise is not None:
        parser.error("--noise is for the digits; leave out --data-dir")
    if options.images and not options.data_dir:
        parser.error("--images is for Fashion-MNIST; give --data-dir")
    options.noise = NOISE if options.noise is None else options.noise
    return options


def notes(options: argparse.Namespace, n_parameters: int, decay: float) -> str:
    """What the numbers of the table are, and are not."""
    lines = [
        "fit s        training for MAP; curvature and prior search for the others, which need a trained network",
        "log marglik  comparable among methods over the same weights only (so is log Z in regression.png)",
        "AUROC        of the entropy of the prediction, test images against out of distribution",
        f"MAP, tuned   trained again with weight decay {decay:.1e}, the prior precision of all, kron per image",
    ]
    if n_parameters > FULL_LIMIT:
        lines.append(f"all, full    left out: {n_parameters} parameters, more than {FULL_LIMIT}")
    lines.append("One data set and one seed; other seeds (--seed) differ.")
    if not options.data_dir:
        lines.append(
            f"Noise of {NOISE:g} was chosen to make MAP overconfident. With --noise 0 MAP is calibrated, and the\n"
            "posteriors, at the prior precision of largest evidence, are underconfident."
        )
    return "\n".join(lines)


def build_model(data: Images) -> nn.Sequential:
    """Two convolutions and two linear layers; 28x28 images are brought down by a stride first."""
    small = data.x_train.shape[-1] <= 8
    channels, features, hidden = (8, 16 * 4, 16) if small else (16, 16 * 9, 32)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1) if small else nn.Conv2d(1, channels, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(features, hidden),
        nn.Tanh(),
        nn.Linear(hidden, data.n_classes),
    )


def trained(data: Images, epochs: int, seed: int, weight_decay: float = 1e-4) -> nn.Sequential:
    """Adam with a cosine schedule."""
    torch.manual_seed(seed)
    model = build_model(data)
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def choices(n_parameters: int) -> list[tuple[str, str]]:
    """The posteriors to compare: which weights, which structure of the curvature."""
    all_weights = ["full"] if n_parameters <= FULL_LIMIT else []
    return [("last_layer", "full"), ("last_layer", "kron")] + [
        ("all", structure) for structure in [*all_weights, "kron", "diag"]
    ]


def fit(model: nn.Module, loader: DataLoader, weights: str, structure: str) -> Laplace:
    """A posterior with the prior precision that maximises its marginal likelihood."""
    la = Laplace(model, "classification", subset_of_weights=weights, hessian_structure=structure)
    la.fit(loader)
    la.optimize_prior_precision()
    return la


def evaluate(name: str, predict: Predict, data: Images, fit_seconds: float) -> Row:
    """Predict the test and the out-of-distribution images, and score the predictions."""
    p, predict_seconds = timed(lambda: in_batches(predict, data.x_test))
    p_ood = in_batches(predict, data.x_ood)
    return Row(
        name=name,
        fit_seconds=fit_seconds,
        predict_seconds=predict_seconds,
        log_marginal_likelihood=None,
        probabilities=p,
        probabilities_ood=p_ood,
        accuracy=float(metrics.accuracy(p, data.y_test)),
        nll=float(metrics.nll(p, data.y_test)),
        ece=float(metrics.ece(p, data.y_test)),
        brier=float(metrics.brier(p, data.y_test)),
        auroc=float(metrics.auroc(metrics.entropy(p), metrics.entropy(p_ood))),
    )


def in_batches(predict: Predict, x: Tensor, size: int = 500) -> Tensor:
    with torch.no_grad():
        return torch.cat([predict(part) for part in x.split(size)])


def softmax_of(model: nn.Module) -> Predict:
    return lambda x: model(x).softmax(-1)


def timed(action: Callable[[], ValueT]) -> tuple[ValueT, float]:
    begin = time.perf_counter()
    value = action()
    return value, time.perf_counter() - begin


def table(rows: Iterable[Row]) -> str:
    columns = ("fit s", "predict s", "log marglik", "acc %", "NLL", "ECE %", "Brier", "AUROC")
    lines = ["method".ljust(18) + "".join(name.rjust(len(name) + 3) for name in columns)]
    lines.append("-" * len(lines[0]))
    for row in rows:
        evidence = row.log_marginal_likelihood
        cells = (
            f"{row.fit_seconds:.2f}",
            f"{row.predict_seconds:.3f}",
            "-" if evidence is None else f"{evidence:.1f}",
            f"{100 * row.accuracy:.1f}",
            f"{row.nll:.3f}",
            f"{100 * row.ece:.1f}",
            f"{row.brier:.3f}",
            f"{row.auroc:.3f}",
        )
        padded = (cell.rjust(len(name) + 3) for cell, name in zip(cells, columns, strict=True))
        lines.append(row.name.ljust(18) + "".join(padded))
    return "\n".join(lines)


def draw(out: Path, shown: dict[str, Row], data: Images, la: Laplace) -> None:
    pictures.reliability(
        out / "reliability.png",
        {name: metrics.calibration_bins(row.probabilities, data.y_test) for name, row in shown.items()},
    )
    pictures.entropies(
        out / "entropy.png",
        {name: metrics.entropy(row.probabilities) for name, row in shown.items()},
        {name: metrics.entropy(row.probabilities_ood) for name, row in shown.items()},
        {name: row.auroc for name, row in shown.items()},
        largest=math.log(data.n_classes),
        outside_name=data.ood_name,
    )
    pictures.spectra(out / "spectrum.png", la)


if __name__ == "__main__":
    main()
