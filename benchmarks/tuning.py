"""The prior precision of the largest evidence, to convergence, beside laplace-torch.

    python benchmarks/tuning.py [--cases kron full]

    kron   784-512-512-10, all weights (0.67 M parameters), Kronecker factors, float32
    full   10-60-60-2, all 4,442 weights, dense curvature, float32

Each search starts from 1e-6, 1 and 1e6. Ours stops where the gradient is 1e-9 of the terms that it is a difference of;
its time is given with the factorisation that the first search needs, and without it (laplace-torch factors Kronecker
curvatures in `fit`). laplace-torch takes 100 steps of Adam by `optimize_prior_precision`, its default; for the dense
curvature three steps are measured and scaled, for each takes seconds. How far it comes in 100 steps, and how many it
would need to be within 1e-4 for good, is counted on the same function of one number, which our evidence gives quickly.
CPU time of one thread, both libraries in one process.
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

from _networks import mlp
from curvlin_nn import Laplace

STARTS = (1e-6, 1.0, 1e6)

MOST_STEPS = 4000
"""Steps of Adam that are counted."""

TARGETS = {"kron": 1 / 20, "full": 1 / 50}
"""Largest ratio of our time to that of 100 steps of laplace-torch, after one factorisation."""


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 2))


def data(case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape, classes = ((1, 28, 28), 10) if case == "kron" else ((10,), 2)
    return torch.randn(256, *shape, generator=generator), torch.randint(classes, (256,), generator=generator)


def network(case: str) -> nn.Module:
    return mlp(10) if case == "kron" else small()


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def adam(la: Laplace, start: float, optimum: float) -> tuple[float, int]:
    """Where the steps of laplace-torch are after 100, and after how many they stay within 1e-4 of the optimum."""
    log = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
    optimiser = torch.optim.Adam([log], lr=0.1)
    after, away, goal = 0.0, 0, torch.tensor(optimum, dtype=torch.float64).log()
    for step in range(1, MOST_STEPS + 1):
        optimiser.zero_grad()
        (-la.log_marginal_likelihood(log.exp())).backward()
        optimiser.step()
        if step == 100:
            after = float(log.detach().exp())
        if float((log.detach() - goal).abs()) > 1e-4:
            away = step
        elif step > max(100, away + 50):
            break
    return after, away + 1


def compare(case: str) -> dict[str, Any]:
    x, y = data(case)
    la = Laplace(network(case), "classification", "all", case).fit([(x, y)])
    factoring, _ = seconds(lambda: la._evidence().curvature.eigenvalues.binned)
    found, times = [], []
    for start in STARTS:
        la.prior_precision = start
        taken, optimum = seconds(la.optimize_prior_precision)
        found.append(float(optimum.prior_precision))
        times.append(taken)
        print(
            f"{case}  curvlin from {start:g}: {found[-1]:.8g}, {optimum.steps} steps, gradient norm "
            f"{optimum.gradient_norm:.1e}, {taken:.3f} s"
        )
    print(f"{case}  curvlin, factorisation before the first: {factoring:.3f} s")
    spread = max(found) / min(found) - 1
    print(f"{case}  curvlin, relative spread of the optima: {spread:.1e} (target 1e-4)")
    results: dict[str, Any] = {"spread": spread, "ours": max(times), "factorisation": factoring}
    if importlib.util.find_spec("laplace") is None:
        print("laplace-torch is not installed beside curvlin: nothing to compare with")
        return results
    import laplace

    theirs = laplace.Laplace(network(case), "classification", subset_of_weights="all", hessian_structure=case)
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    steps = 100 if case == "kron" else 3
    taken, _ = seconds(
        lambda: theirs.optimize_prior_precision(method="marglik", n_steps=steps, pred_type="glm")
    )
    per_step = taken / steps
    print(f"{case}  laplace-torch: {per_step:.3f} s for each step, {100 * per_step:.1f} s for 100")
    for start in STARTS:
        after, needed = adam(la, start, found[0])
        print(
            f"{case}  laplace-torch from {start:g}: at {after:.3g} after 100 steps, within 1e-4 "
            + (
                f"after {needed} ({needed * per_step:.0f} s)"
                if needed < MOST_STEPS
                else f"not in {MOST_STEPS}"
            )
        )
    results["theirs"] = 100 * per_step
    results["ratio"] = max(times) / results["theirs"]
    results["ratio with factorisation"] = (max(times) + factoring) / results["theirs"]
    verdict = "reached" if results["ratio"] <= TARGETS[case] else "MISSED"
    print(
        f"{case}  time: 1/{1 / results['ratio']:.0f}, with the factorisation 1/"
        f"{1 / results['ratio with factorisation']:.1f} (target 1/{1 / TARGETS[case]:.0f}: {verdict})\n"
    )
    return results


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cases", nargs="+", choices=TARGETS, default=list(TARGETS))
    options.add_argument("--json", type=Path, help="also write the results here")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {case: compare(case) for case in chosen.cases}
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
