"""Curvature of networks beside the peers: time for the same matrix from the same data.

    python benchmarks/curvature.py [--threads 1] [--repeats 5] [--only S1 S4]

Networks on 28 x 28 images, float32: an MLP 784-512-512-C and a CNN (convolutions 32/64/64, two linear layers).

    S1  KFAC of the exact GGN, MLP, C = 10 and 100           curvlinops KFAC
    S2  KFAC of the exact GGN, CNN                            curvlinops KFAC
    S3  KFAC with one Monte-Carlo column                      one forward and backward pass
    S4  diagonal of the exact GGN                             BackPACK, curvlinops
    S6  NTK Gram matrix of 128 points                         J J^T with J multiplied out
    S10 GGN times 32 columns                                  torch.func's jvp and vjp
    S12 growth of time and memory with the number of samples  ourselves

KFAC's products are in float64; the same in float32, which is what the peers compute in, is the second figure.

S1 to S4 see ten batches, which are held to the target: what is verified on the first one counts once. Besides, what a
further batch costs, as data have hundreds, and the floor of that: what arithmetic alone takes (`_floors.py`). Peers
run without the passes that only check or count, and with the numbers that these would find. Times are CPU time, the
least of several, ours and theirs in turn.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import _floors as floors
from _networks import cnn, in_process, mlp, peak_memory

try:
    import curvlin  # noqa: F401
except ImportError:  # run from a checkout, in an environment that has the peers only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from curvlin_nn import curvature, feature_maps, matrix_free, structures

SINGLE = functools.partial(structures.Kronecker, dtype=torch.float32)
Data = list[tuple[Tensor, Tensor]]
Pass = Callable[[Data], Any]
NameT = TypeVar("NameT")
PEERS = ("torch", "curvlinops-for-pytorch", "backpack-for-pytorch")


def data(n_samples: int, n_outputs: int, n_batches: int = 10) -> Data:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n_samples, 1, 28, 28, generator=generator),
            torch.randint(n_outputs, (n_samples,), generator=generator),
        )
        for _ in range(n_batches)
    ]


def least(calls: dict[NameT, Callable[[], Any]], repeats: int) -> dict[NameT, float]:
    """The least CPU seconds of each call, run in turn."""
    seconds = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds


def report(label: str, found: dict[str, float], targets: dict[str, float]) -> None:
    print(label, ", ".join(f"{name} {seconds:.4f} s" for name, seconds in found.items()))
    for name, bound in targets.items():
        if name not in found:
            print(f"    {name} is not installed")
            continue
        for ours in (variant for variant in found if variant.startswith("ours")):
            ratio = found[ours] / found[name]
            verdict = "reached" if ratio <= bound else "MISSED"
            print(f"    {ours} / {name}: {ratio:.3f} (target {bound:.3g}: {verdict})", flush=True)


def compare(
    label: str,
    calls: dict[str, Pass],
    batches: Data,
    bounds: dict[str, float],
    targets: dict[str, float],
    repeats: int,
) -> None:
    """Times over all batches, of a further batch, and the floor of that; and their ratios to each peer's."""
    sizes = 1, len(batches)
    found = least(
        {(name, n): functools.partial(call, batches[:n]) for name, call in calls.items() for n in sizes},
        repeats,
    )
    whole = {name: found[name, len(batches)] for name in calls}
    further = {name: (whole[name] - found[name, 1]) / (len(batches) - 1) for name in calls}
    print(f"{label:50s}{f'{len(batches)} batches':>12s}   a further one   floor of that")
    for name in calls:
        floor = f"{bounds[name]:12.4f} s" if name in bounds else ""
        print(f"    {name:46s}{whole[name]:10.4f} s{further[name]:12.4f} s{floor}")
    for name, bound in targets.items():
        if name not in calls:
            print(f"    {name} is not installed")
            continue
        for ours in bounds:
            verdict = "reached" if whole[ours] / whole[name] <= bound else "MISSED"
            ratios = whole[ours] / whole[name], further[ours] / further[name], bounds[ours] / further[name]
            figures = "".join(f"{ratio:12.3f}  " for ratio in ratios)
            print(f"    {f'{ours} / {name}':46s}{figures}  target {bound:.3g}: {verdict}", flush=True)


# -- peers --------------------------------------------------------------------------------------------------------


def curvlinops_kfac(model: nn.Module, fisher_type: str) -> Pass | None:
    try:
        from curvlinops import KFACLinearOperator
    except ImportError:
        return None

    def run(batches: Data) -> None:
        operator = KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            list(model.parameters()),
            batches,
            check_deterministic=False,
            fisher_type=fisher_type,
            num_per_example_loss_terms=1,
            num_data=sum(len(y) for _, y in batches),
        )
        operator.compute_kronecker_factors()

    return run


def backpack_diagonal(model: nn.Module) -> Pass | None:
    try:
        from backpack import backpack, extend
        from backpack.extensions import DiagGGNExact
    except ImportError:
        return None
    extended, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run(batches: Data) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in batches:
            with backpack(DiagGGNExact()):
                loss(extended(x), y).backward()
            total = [t + p.diag_ggn_exact for t, p in zip(total, model.parameters(), strict=True)]
            model.zero_grad()
        return total

    return run


def passes(model: nn.Module, batches: Data) -> None:
    """One plain forward and backward pass."""
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    model.zero_grad()


# -- measurements -------------------------------------------------------------------------------------------------


def kfac(
    label: str, model: nn.Module, batches: Data, target: float, repeats: int, columns: str = "exact"
) -> None:
    calls: dict[str, Pass] = {
        "ours": lambda b: curvature(model, "classification", b, "kron", columns=columns),
        "ours in float32": lambda b: curvature(model, "classification", b, SINGLE, columns=columns),
        "fwd+bwd": functools.partial(passes, model),
    }
    if (peer := curvlinops_kfac(model, "type-2" if columns == "exact" else "mc")) is not None:
        calls["curvlinops"] = peer
    x = batches[0][0]
    n_columns = model(x).shape[-1] - 1 if columns == "exact" else 1
    bounds = {
        "ours": floors.kfac(model, x, n_columns, torch.float64),
        "ours in float32": floors.kfac(model, x, n_columns, torch.float32),
    }
    targets = {"curvlinops": target} if columns == "exact" else {"fwd+bwd": target, "curvlinops": 1.0}
    compare(label, calls, batches, bounds, targets, repeats)


def s1(repeats: int) -> None:
    kfac("S1  KFAC, MLP, C = 10", mlp(10), data(256, 10), 0.45, repeats)
    kfac("S1  KFAC, MLP, C = 100", mlp(100), data(128, 100), 0.35, repeats)


def s2(repeats: int) -> None:
    kfac("S2  KFAC, CNN", cnn(), data(64, 10), 0.7, repeats)


def s3(repeats: int) -> None:
    kfac("S3  KFAC mc, MLP", mlp(10), data(256, 10), 1.5, repeats, columns="mc")
    kfac("S3  KFAC mc, CNN", cnn(), data(64, 10), 2.0, repeats, columns="mc")


def s4(repeats: int) -> None:
    for label, model, batches, target in (
        ("S4  diagonal, MLP", mlp(10), data(256, 10), 0.5),
        ("S4  diagonal, CNN", cnn(), data(32, 10), 0.8),
    ):
        calls: dict[str, Pass] = {"ours": lambda b, m=model: curvature(m, "classification", b, "diag")}
        if (peer := backpack_diagonal(model)) is not None:
            calls["BackPACK"] = peer
        bounds = {"ours": floors.diagonal(model, batches[0][0], 9)}
        compare(label, calls, batches, bounds, {"BackPACK": target}, repeats)


def s6(repeats: int) -> None:
    model, ((x, _),) = mlp(10), data(128, 10, 1)
    jacobians = feature_maps.JacobianMap(model)
    jacobians(x)
    J = jacobians(x)[1].to_dense().flatten(0, 1)
    found = least({"ours": lambda: jacobians(x)[1].gram()}, repeats)
    found |= least({"J J^T": lambda: J @ J.mT}, 1)
    report("S6  NTK Gram, MLP, 128 points", found, {"J J^T": 1 / 100})


def s10(repeats: int) -> None:
    model, ((x, y),) = mlp(10), data(128, 10, 1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    H = matrix_free(model, "classification", [(x, y)])

    def product(v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in parameters.values()])
        tangent = {n: t.view_as(p) for (n, p), t in zip(parameters.items(), parts, strict=True)}
        f, Jv = torch.func.jvp(
            lambda p: torch.func.functional_call(model, p, (x,)), (parameters,), (tangent,)
        )
        p = f.softmax(-1)
        HJv = p * Jv - p * (p * Jv).sum(-1, keepdim=True)
        (gradient,) = torch.func.vjp(lambda p: torch.func.functional_call(model, p, (x,)), parameters)[1](HJv)
        return torch.cat([gradient[name].flatten() for name in parameters])

    for n_columns in (1, 8, 32):
        V = torch.randn(sum(p.numel() for p in parameters.values()), n_columns)
        found = least(
            {
                "ours": lambda V=V: H @ V,
                "torch.func, loop": lambda V=V: torch.stack([product(v) for v in V.mT], dim=1),
                "torch.func, vmap": lambda V=V: torch.func.vmap(product, 1, 1)(V),
            },
            repeats,
        )
        print(f"S10 floor {floors.ggn_product(model, x, n_columns):.4f} s")
        report(f"S10 GGN times {n_columns}", found, {"torch.func, loop": 0.6, "torch.func, vmap": 0.6})


def s12(repeats: int) -> None:
    """Each size in a process of its own, so that each has a peak of memory of its own."""
    for name in ("mlp", "cnn"):
        print(f"S12 {name}: samples, seconds to fit KFAC and to predict, their memory in MB")
        for n_batches in (4, 8, 16, 32):
            figures = in_process(growth, name, n_batches)
            print(f"    {64 * n_batches:6d}" + "".join(f"{figure:10.2f}" for figure in figures), flush=True)


def growth(name: str, n_batches: int) -> tuple[float, float, float, float]:
    from curvlin_nn import Laplace

    torch.set_num_threads(1)
    model = mlp(10) if name == "mlp" else cnn()
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(64, 1, 28, 28, generator=generator), torch.randint(10, (64,), generator=generator)

    la = Laplace(model, "classification", "all", "kron").fit([batch()])
    la(batch()[0])
    figures = []
    for work in (
        lambda: la.fit(batch() for _ in range(n_batches)),
        lambda: [la(batch()[0]) for _ in range(n_batches)],
    ):
        before, started = peak_memory(reset=True), time.process_time()
        work()
        figures += [time.process_time() - started, peak_memory() - before]
    seconds_fit, memory_fit, seconds_predict, memory_predict = figures
    return seconds_fit, seconds_predict, memory_fit, memory_predict


def main() -> None:
    measurements = {"S1": s1, "S2": s2, "S3": s3, "S4": s4, "S6": s6, "S10": s10, "S12": s12}
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--only", nargs="+", choices=measurements, default=list(measurements))
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PEERS)
    print(f"Python {platform.python_version()}, {versions}; {chosen.threads} threads")
    print(floors.rates())
    for name in chosen.only:
        measurements[name](chosen.repeats)


if __name__ == "__main__":
    main()
