"""Predictive covariance of 200 test points under a KFAC posterior over all weights, beside laplace-torch.

    python benchmarks/predictive.py [--points 200] [--peer-points 20]

Two networks on 28 x 28 images, ten classes, float32, one thread:

    mlp   784-512-512-10                                       0.67 M parameters
    cnn   conv 32/64/64 (3 x 3), two poolings, 128-10          0.46 M parameters

Each run has a process of its own. Time is CPU time of the call, the least of several; memory is the rise of the
resident set's peak during it (Linux). laplace-torch multiplies the Jacobian of all points of a call out, and
differentiates each output with respect to the whole batch: 200 points in one call do not fit. It is run on fewer
points, in calls of 1, 5 and 20. Its time is scaled to the number of points, and its best counts; memory is
compared between its calls of 20 points and ours of 200. The covariances of the two agree to rounding for the
first network; for the second they differ, because laplace-torch leaves out the cross terms between pixels in the
blocks of convolution biases.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _networks import cnn, in_process, mlp, peak_memory

TARGETS = {"mlp": (1 / 500, 1 / 20), "cnn": (1 / 30, 1 / 20)}
"""Largest ratio of time and of memory, ours to the peer's."""


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": lambda: mlp(10), "cnn": cnn}


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 28, 28, generator=generator), torch.randint(10, (n,), generator=generator)


def ours(name: str) -> Callable[[Tensor], Tensor]:
    from curvlin_nn import Laplace

    la = Laplace(NETWORKS[name](), "classification", "all", "kron").fit([data(128, seed=1)])
    _ = la.posterior_precision  # factored, as after a first prediction
    return lambda x: la._predictive().mean_and_covariance(x)[1]


def peer(name: str) -> Callable[[Tensor], Tensor]:
    import laplace

    la = laplace.Laplace(
        NETWORKS[name](), "classification", subset_of_weights="all", hessian_structure="kron"
    )
    la.fit(DataLoader(TensorDataset(*data(128, seed=1)), batch_size=128))
    return lambda x: la._glm_predictive_distribution(x)[1]


def run(library: str, name: str, points: int, per_call: int, repeats: int) -> dict[str, Any]:
    """CPU seconds (least of `repeats`), peak memory in MB, and the covariances of the first points."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    covariance = {"ours": ours, "laplace-torch": peer}[library](name)
    x, _ = data(points, seed=2)
    covariance(x[:1])
    before = peak_memory(reset=True)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        found = [covariance(part) for part in x.split(per_call)]
        seconds.append(time.process_time() - start)
    return {
        "seconds": min(seconds),
        "megabytes": peak_memory() - before,
        "covariance": torch.cat(found)[:20].tolist(),
    }


def compare(name: str, points: int, peer_points: int) -> dict[str, float]:
    mine = in_process(run, "ours", name, points, points, 5)
    theirs: dict[int, dict[str, Any]] = {}
    for per_call in (1, 5, 20):
        theirs[per_call] = in_process(run, "laplace-torch", name, peer_points, per_call, 1)
        theirs[per_call]["seconds"] *= points / peer_points
    best = min(theirs.values(), key=lambda result: result["seconds"])
    shown = {f"laplace-torch, {n} per call": result for n, result in theirs.items()}
    for label, result in {f"curvlin, {points} in one call": mine, **shown}.items():
        print(f"{name}  {label:28s}{result['seconds']:10.3f} s {result['megabytes']:10.0f} MB")
    same = min(len(mine["covariance"]), peer_points)
    a, b = (torch.tensor(result["covariance"])[:same] for result in (mine, best))
    return {
        "time": mine["seconds"] / best["seconds"],
        "memory": mine["megabytes"] / theirs[20]["megabytes"],
        "difference": float((a - b).abs().max() / b.abs().max()),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--points", type=int, default=200, help="test points (default 200)")
    options.add_argument("--peer-points", type=int, default=20, help="points the peer is run on (default 20)")
    options.add_argument("--networks", nargs="+", choices=TARGETS, default=list(TARGETS))
    options.add_argument("--json", type=Path, help="also write the ratios here")
    chosen = options.parse_args()
    if importlib.util.find_spec("laplace") is None:
        print("laplace-torch is not installed beside curvlin: nothing to compare with")
        return
    ratios = {}
    for name in chosen.networks:
        found = ratios[name] = compare(name, chosen.points, chosen.peer_points)
        for quantity, bound in zip(("time", "memory"), TARGETS[name], strict=True):
            verdict = "reached" if found[quantity] <= bound else "MISSED"
            print(f"{name}  {quantity}: 1/{1 / found[quantity]:.0f} (target 1/{1 / bound:.0f}: {verdict})")
        print(
            f"{name}  largest difference of the covariances: {found['difference']:.1e} of the largest entry\n"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()
