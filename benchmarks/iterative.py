"""What iterative answers cost and how far off they are: a network's curvature, and solves and traces beside peers.

    python benchmarks/iterative.py [--seeds N] [--threads N]

1. log det(GGN + delta I) of the demo's trained network by stochastic Lanczos quadrature, split by a KFAC
   preconditioner, against the dense determinant. Then what ten probes cannot do better than, whatever follows them:
   the standard deviation of their estimate from the exact logarithm, also with the exact blocks of layers split off.
2. Solves of a sparse system with many right-hand sides: SciPy's cg (one at a time), linear_operator's linear_cg, ours;
   also for the same matrix in other units.
3. Traces of a matrix with a decaying spectrum: curvlinops' estimators and ours; how often intervals cover the truth.
   Its estimators return no standard error, so only errors are compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
try:
    import curvlin  # noqa: F401
except ImportError:  # run from a checkout, in an environment that has the peers only
    sys.path.insert(0, str(ROOT / "src"))
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

from linear_operator.utils.linear_cg import linear_cg  # noqa: E402

from curvlin import Isotropic, IterativePrecision  # noqa: E402
from curvlin_nn import curvature  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("torch", "scipy", "linear_operator", "curvlinops-for-pytorch")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names))
    print(f"{options.threads} threads, {options.seeds} seeds\n")
    network(options.seeds)
    solves()
    traces(options.seeds)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# -- a network's curvature ----------------------------------------------------------------------------------------


def network(seeds: int) -> None:
    from _data import digits
    from demo import NOISE, trained

    data = digits(noise=NOISE, seed=0)
    model = trained(data, 80, 0).double()
    x, y = data.x_train.double(), data.y_train
    loader = DataLoader(TensorDataset(x, y), batch_size=256)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    D, delta = sum(p.numel() for p in parameters.values()), 1.0
    shift = Isotropic(torch.tensor(delta, dtype=torch.float64), D)
    M = curvature(model, "classification", loader, hessian_structure="kron").to(torch.float64) + shift
    dense = curvature(model, "classification", loader, hessian_structure="full").to(torch.float64) + shift
    truth = dense.logdet()

    def multiply(X: Tensor) -> Tensor:
        return ggn_product(model, parameters, x, X) + delta * X

    P = IterativePrecision(multiply, size=D, dtype=torch.float64)
    print(f"log det(GGN + I), demo network, D = {D}, truth {float(truth):.2f}")
    print(f"{'preconditioner':<16}{'steps':>6}{'products':>9}{'max |z|':>9}{'error':>10}{'s.e.':>10}{'s':>7}")
    for name, preconditioner in (("none", None), ("KFAC + I", M)):
        Q = P.preconditioned_by(preconditioner)
        for steps in (3, 30, 100):
            started = time.perf_counter()
            found = [
                Q.logdet(10, max_steps=steps, generator=torch.Generator().manual_seed(s))
                for s in range(seeds)
            ]
            seconds = (time.perf_counter() - started) / seeds
            errors = torch.stack([e.value - truth for e in found])
            own = torch.stack([e.standard_error for e in found])
            print(
                f"{name:<16}{steps:>6}{max(e.products for e in found):>9}{float((errors / own).abs().max()):>9.2f}"
                f"{float((errors / truth).square().mean().sqrt()):>10.1e}{float((own / truth).mean()):>10.1e}"
                f"{seconds:>7.2f}"
            )
    floors(
        dense.to_dense(),
        {"KFAC + I": M.to_dense(), "blocks + I": blocks(dense.to_dense(), parameters)},
        truth,
    )
    b = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, helped = P.solve(b), P.preconditioned_by(M).solve(b)
    print(f"solve to 1.5e-8: {plain.iterations} iterations, {helped.iterations} with KFAC + I\n")


def blocks(P: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """P without what couples one parameter tensor to another."""
    spans = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(parameters.values())])
    return torch.where(spans[:, None] == spans, P, 0.0)


def floors(P: Tensor, preconditioners: dict[str, Tensor], truth: Tensor) -> None:
    """``sqrt(2 / m) ||offdiag log S||_F`` with ``S = R^-1 P R^-T``, for m = 10 probes of signs; exact quadrature.

    It depends on the root R of the preconditioner: here in its eigenbasis, the best of those tried.
    """
    for name, M in ({"none": torch.eye(len(P), dtype=P.dtype)} | preconditioners).items():
        values, vectors = torch.linalg.eigh(M)
        inverse_root = vectors / values.sqrt()
        logs, basis = torch.linalg.eigh(inverse_root.mT @ P @ inverse_root)
        log_S = (basis * logs.log()) @ basis.mT
        off = log_S - log_S.diagonal().diag()
        deviation = (2 / 10) ** 0.5 * torch.linalg.matrix_norm(off)
        print(
            f"floor of 10 probes, {name:<12}{float(deviation):>8.2f}{float(deviation / truth):>10.1e} of the whole"
        )


def ggn_product(model: torch.nn.Module, parameters: dict[str, Tensor], x: Tensor, X: Tensor) -> Tensor:
    """``sum_n J_n^T (diag p_n - p_n p_n^T) J_n X``, all columns at once."""

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,))

    def one(v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in parameters.values()])
        tangent = {name: t.view_as(p) for (name, p), t in zip(parameters.items(), parts, strict=True)}
        f, Jv = jvp(outputs, (parameters,), (tangent,))
        p = f.softmax(-1)
        HJv = p * Jv - p * (p * Jv).sum(-1, keepdim=True)
        (gradient,) = vjp(outputs, parameters)[1](HJv)
        return torch.cat([gradient[name].flatten() for name in parameters])

    return vmap(one, in_dims=1, out_dims=1, chunk_size=10)(X)


# -- solves -------------------------------------------------------------------------------------------------------


def solves() -> None:
    n, columns, rtol = 20_000, 16, 1e-8
    generator = torch.Generator().manual_seed(0)
    # A random walk observed with noise: tridiagonal, condition 1e4.
    A = scipy.sparse.diags_array([-1.0, 2.0 + 4e-4, -1.0], offsets=[-1, 0, 1], shape=(n, n)).tocsr()
    B = torch.randn(n, columns, dtype=torch.float64, generator=generator)
    print(
        f"sparse solves, D = {n}, {columns} right-hand sides, rtol {rtol:.0e}; residual is the worst column's"
    )
    for unit in (1.0, 2.0**-40):
        matrix = A * unit
        P = IterativePrecision(matrix)

        def scipy_cg(matrix: scipy.sparse.csr_array = matrix) -> Tensor:
            answers = [
                scipy.sparse.linalg.cg(matrix, b, rtol=rtol, atol=0.0, maxiter=5000)[0] for b in B.T.numpy()
            ]
            return torch.stack([torch.from_numpy(x) for x in answers], dim=-1)

        def theirs(P: IterativePrecision = P) -> Tensor:
            return linear_cg(P.__matmul__, B, tolerance=rtol, max_iter=5000, max_tridiag_iter=0)

        def ours(P: IterativePrecision = P) -> Tensor:
            return P.solve(B, rtol=rtol, max_iterations=5000).value

        for name, solve in (("SciPy cg", scipy_cg), ("linear_cg", theirs), ("ours", ours)):
            x, seconds = timed(solve)
            residual = (torch.linalg.vector_norm(B - P @ x, dim=0) / torch.linalg.vector_norm(B, dim=0)).max()
            print(
                f"  times 2^{0 if unit == 1 else -40:<5}{name:<12}{seconds:>8.2f} s   residual {float(residual):.1e}"
            )
    print()


# -- traces -------------------------------------------------------------------------------------------------------


def traces(seeds: int) -> None:
    n, products = 1000, 60
    generator = torch.Generator().manual_seed(0)
    values = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    A = (Q * values) @ Q.mT
    A = (A + A.mT) / 2
    P, truth = IterativePrecision(A), A.trace()
    print(f"traces, D = {n}, eigenvalues 1/i, {products} products, {10 * seeds} seeds")
    peers: dict[str, Callable[[], Tensor]] = {}
    try:
        from curvlinops import hutchpp_trace, xtrace  # type: ignore[import-not-found]

        peers = {
            "hutch++": lambda: hutchpp_trace(A, products),
            "xtrace": lambda: xtrace(A, products),
        }
    except ImportError:
        print("  curvlinops is not installed")
    for method in ("hutchinson", "hutch++", "xtrace"):
        found = [
            P.trace(products, method=method, generator=torch.Generator().manual_seed(s))
            for s in range(10 * seeds)
        ]
        error = torch.stack([(e.value - truth) / truth for e in found]).square().mean().sqrt()
        inside = sum(bool(low <= truth <= high) for low, high in (e.interval(0.95) for e in found)) / len(
            found
        )
        line = f"  {method:<12}error {float(error):.2e}, 95 % intervals cover {inside:.0%}"
        if method in peers:
            torch.manual_seed(0)
            theirs = torch.stack([(peers[method]() - truth) / truth for _ in range(10 * seeds)])
            line += f"; curvlinops: error {float(theirs.square().mean().sqrt()):.2e}"
        print(line)


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
