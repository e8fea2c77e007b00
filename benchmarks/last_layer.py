"""Fit and predict with a last layer of many classes, beside laplace-torch.

    python benchmarks/last_layer.py [--classes 100 1000] [--points 64]

A network with 512 features and C classes, 64 points, float32, one thread; "kron" (the default of both libraries) and
"diag". The body is small, so that what is measured is the last layer: laplace-torch multiplies its Jacobian
``I (x) phi`` out, ``N C (C D + C)`` numbers; here it stays a product, and the curvature of the outputs needs no
columns.

Each run has a process of its own. Time is CPU time: of the fit, of the first call of ``la(x)`` behind it (which
factorises the posterior), and the least of all calls: four, of laplace-torch one, which takes long. Memory is the rise
of the resident set's peak (Linux). A run of laplace-torch whose Jacobian alone exceeds ``--limit`` is not started.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _networks import in_process, peak_memory

TARGET = 1 / 100
"""Largest ratio of the time of a prediction, ours to the peer's."""

MEMORY = 2048
"""MiB that 1000 classes may take."""

WIDTH = 512


def network(n_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, n_classes))


def data(n: int, n_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 32, generator=generator), torch.randint(n_classes, (n,), generator=generator)


def ours(n_classes: int, structure: str, train: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    from curvlin_nn import Laplace

    return Laplace(network(n_classes), "classification", "last_layer", structure).fit([train])


def peer(n_classes: int, structure: str, train: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    import laplace

    la = laplace.Laplace(
        network(n_classes), "classification", subset_of_weights="last_layer", hessian_structure=structure
    )
    la.fit(DataLoader(TensorDataset(*train), batch_size=len(train[0])))
    return la


def run(library: str, n_classes: int, structure: str, points: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fit = {"curvlin": ours, "laplace-torch": peer}[library]
    fit(3, structure, data(4, 3, seed=0))(data(4, 3, seed=1)[0])  # imports, and what is prepared once
    train, (x, _) = data(points, n_classes, seed=1), data(points, n_classes, seed=2)
    before = peak_memory(reset=True)
    times = [time.process_time()]
    la = fit(n_classes, structure, train)
    times.append(time.process_time())
    fit_memory = peak_memory() - before
    for _ in range(4 if library == "curvlin" else 1):
        found = la(x)
        times.append(time.process_time())
    seconds = [b - a for a, b in pairwise(times)]
    return {
        "fit": seconds[0],
        "first": seconds[1],
        "predict": min(seconds[1:]),
        "fit memory": fit_memory,
        "memory": peak_memory() - before,
        "probabilities": found[:8].detach().tolist(),
    }


def show(label: str, result: dict[str, Any]) -> None:
    print(
        f"{label:32s} fit {result['fit']:8.3f} s   first prediction {result['first']:8.3f} s   best "
        f"{result['predict']:8.3f} s   peak +{result['memory']:7.0f} MiB"
    )


def compare(n_classes: int, structure: str, points: int, limit: float) -> dict[str, Any]:
    mine = in_process(run, "curvlin", n_classes, structure, points)
    show(f"C={n_classes} {structure} curvlin", mine)
    result: dict[str, Any] = {"ours": {key: mine[key] for key in ("fit", "first", "predict", "memory")}}
    gib = 4 * points * n_classes * (n_classes * WIDTH + n_classes) / 2**30
    if importlib.util.find_spec("laplace") is None:
        print("laplace-torch is not installed beside curvlin")
        return result
    if gib > limit:
        print(
            f"C={n_classes} {structure} laplace-torch: not run, its Jacobian of {points} points has {gib:.0f} GiB\n"
        )
        return result
    theirs = in_process(run, "laplace-torch", n_classes, structure, points)
    show(f"C={n_classes} {structure} laplace-torch", theirs)
    a, b = (torch.tensor(r["probabilities"]) for r in (mine, theirs))
    ratio = mine["predict"] / theirs["predict"]
    verdict = "reached" if ratio <= TARGET else "MISSED"
    print(
        f"C={n_classes} {structure}: predict 1/{1 / ratio:.0f} (target 1/{1 / TARGET:.0f}: {verdict}), fit "
        f"1/{theirs['fit'] / mine['fit']:.0f}; largest relative difference of probabilities "
        f"{float(((a - b) / b).abs().max()):.1e}\n"
    )
    return result | {"theirs": {key: theirs[key] for key in result["ours"]}}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    options.add_argument("--points", type=int, default=64, help="training and test points (default 64)")
    options.add_argument(
        "--limit", type=float, default=4.0, help="GiB of laplace-torch's Jacobian (default 4)"
    )
    options.add_argument("--json", type=Path, help="also write the results here")
    chosen = options.parse_args()
    results = {
        f"{n_classes} {structure}": compare(n_classes, structure, chosen.points, chosen.limit)
        for n_classes in chosen.classes
        for structure in ("kron", "diag")
    }
    worst = max((r["ours"]["memory"] for name, r in results.items() if name.startswith("1000")), default=None)
    if worst is not None:
        verdict = "reached" if worst <= MEMORY else "MISSED"
        print(f"C=1000: peak +{worst:.0f} MiB (target {MEMORY} MiB: {verdict})")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
