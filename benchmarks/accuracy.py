"""Accuracy of operators over condition, scale, size and dtype, beside linear_operator and CoLA.

    python benchmarks/accuracy.py [--write docs/evidence.md] [--quick]

Every answer is compared with the closed form in 50 digits (`_truth.py`). Errors of solve, inv_quad and gradients are
relative in norm (the worst input tensor counts), of the inverse diagonal in the worst entry, of logdet absolute; that
of samples is the largest relative error of their variance in any direction, from the linear map that makes them and not
from draws. A failure is shown as the name of the exception. `--write` puts the tables between the markers of a page.
Takes about four minutes of processor time; CoLA is measured where it is installed.
"""

from __future__ import annotations

import argparse
import functools
import platform
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

try:
    import curvlin  # noqa: F401
except ImportError:  # run from a checkout, in an environment that has the peers only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from _families import FAMILIES, Problem, make
from _routes import (
    DenseCholesky,
    Iterative,
    LinearOperatorLarge,
    NotOffered,
    Ours,
    Route,
    routes,
    versions,
)
from _truth import Truth, truth

LIMIT = 3  # seconds for one answer
SMALL, LARGE = 48, 1024
DTYPES = {"float64": torch.float64, "float32": torch.float32}
CONDITIONS = {
    (SMALL, "float64"): (1e2, 1e4, 1e6, 1e8, 1e10, 1e12),
    (LARGE, "float64"): (1e2, 1e6, 1e10),
    (SMALL, "float32"): (1e2, 1e4, 1e6),
    (LARGE, "float32"): (1e4,),
}
SCALES = {SMALL: (-40, -20, 0, 20, 40), LARGE: (-40, 0, 40)}
SCALED_CONDITION = 1e6
QUANTITIES = {
    "solve": "solve",
    "inv_quad": "inv_quad",
    "logdet": "logdet",
    "inverse_diagonal": "diag P⁻¹",
    "root": "draws of N(0, P)",
    "inverse_root": "draws of N(0, P⁻¹)",
    "gradients": "gradients",
}


# -- one answer ----------------------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


def variance_error(whitener: Tensor, root: Tensor) -> float:
    """The largest ``|v - 1|`` over the variances v of draws ``root z`` in coordinates where they should be 1."""
    white = whitener.mT @ root.detach().double()
    if not bool(torch.isfinite(white).all()):
        return float("nan")
    # Subspace iteration for the largest eigenvalue of |white white^T - I|.
    g = torch.Generator().manual_seed(0)
    V = torch.randn(len(white), 8, dtype=torch.float64, generator=g)
    for _ in range(15):
        V = torch.linalg.qr(V)[0]
        V = white @ (white.mT @ V) - V
    return float(torch.linalg.matrix_norm(V, 2))


def symmetrised(g: Tensor) -> Tensor:
    square = g.ndim >= 2 and g.shape[-1] == g.shape[-2]
    return (g + g.mT) / 2 if square else g


def gradients(route: Route, problem: Problem) -> tuple[Tensor, ...]:
    """Of ``b^T P^-1 b + log det P`` with respect to the tensors of P."""
    leaves = tuple(t.clone().requires_grad_() for t in problem.inputs)
    P = route.operator(problem.with_inputs(leaves))
    return torch.autograd.grad(route.inv_quad(P, problem.b) + route.logdet(P), leaves)


def answer(quantity: str, route: Route, problem: Problem) -> Any:
    """What a library says."""
    torch.manual_seed(0)  # for answers that are random
    with limited(LIMIT), route.settings():
        if quantity == "gradients":
            return gradients(route, problem)
        with torch.no_grad():
            ask, P = getattr(route, quantity), route.operator(problem)
            return ask(P, problem.b) if quantity in ("solve", "inv_quad") else ask(P)


def error(quantity: str, found: Any, exact: Truth) -> float:
    """How wrong it is, as the module's docstring says."""
    if quantity == "gradients":
        pairs = zip(found, exact.gradients, strict=True)
        return max(relative(symmetrised(g), expected) for g, expected in pairs)
    if quantity == "solve":
        return relative(found, exact.solve)
    if quantity == "inv_quad":
        return abs(float(found) / exact.inv_quad - 1)
    if quantity == "logdet":
        return abs(float(found) - exact.logdet)
    if quantity == "inverse_diagonal":
        return float((found.double() / exact.inverse_diagonal - 1).abs().max())
    return variance_error(exact.inverse_root if quantity == "root" else exact.root, found)


class OutOfTime(Exception):
    """The answer took longer than `LIMIT`."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stops what runs inside at its next line of Python after so many seconds of processor time."""

    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Cells:
    """Errors as text, each measured once; what ran out of time once is not tried in other settings."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}
        self._slow: set[tuple[object, ...]] = set()

    def __call__(
        self, quantity: str, route: Route, setting: tuple[str, int, float, torch.dtype], power: int = 0
    ) -> str:
        """The error in a setting (family, size, condition, dtype) of the matrix times ``2^power``."""
        if not route.available:
            return "not installed"
        family, size, *_ = setting
        row = (quantity, route.name, family, size)
        if row in self._slow:
            return f"> {LIMIT} s"
        key = (quantity, route.name, setting, power)
        if key not in self._known:
            self._known[key] = self._measured(quantity, route, setting, power)
            if self._known[key].startswith(">"):
                self._slow.add(row)
        return self._known[key]

    def _measured(
        self, quantity: str, route: Route, setting: tuple[str, int, float, torch.dtype], power: int
    ) -> str:
        problem, exact = make(*setting, scale=2.0**power), exact_answers(*setting)
        try:
            found = answer(quantity, route, problem)
            return _number(error(quantity, found, exact if power == 0 else exact.scaled(2.0**power)))
        except NotOffered:
            return "–"
        except Iterative:
            return "iterative"
        except OutOfTime:
            return f"> {LIMIT} s"
        except Exception as failure:
            return f"`{type(failure).__name__}`"


def _number(e: float) -> str:
    return "0" if e == 0 else f"{e:.0e}"


# -- tables --------------------------------------------------------------------------------------------------------


@functools.cache
def exact_answers(family: str, size: int, condition: float, dtype: torch.dtype) -> Truth:
    return truth(make(family, size, condition, dtype))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def folded(title: str, content: str) -> str:
    indented = "\n".join(f"    {line}" if line else "" for line in content.splitlines())
    return f'??? abstract "{title}"\n\n{indented}\n'


def at(cells: Cells, family: str, size: int, condition: float, dtype: torch.dtype, route: Route) -> list[str]:
    """All quantities in one setting."""
    return [cells(quantity, route, (family, size, condition, dtype)) for quantity in QUANTITIES]


def summary(cells: Cells, families: list[str], size: int, condition: float) -> str:
    """One setting, all quantities."""
    rows = []
    for family in families:
        print(f"summary: {family}", file=sys.stderr)
        for i, route in enumerate(routes(size)):
            found = at(cells, family, size, condition, torch.float64, route)
            rows.append(["" if i else family, route.name, *found])
    return table(["operator", "", *QUANTITIES.values()], rows)


def over_condition(cells: Cells, families: list[str], quantity: str, conditions: tuple[float, ...]) -> str:
    """One quantity of the small operators, with the algorithms that run on large ones."""
    chosen = (Ours.name, DenseCholesky.name, LinearOperatorLarge.name)
    rows = []
    for family in families:
        for i, route in enumerate(r for r in routes(SMALL) if r.name in chosen):
            found = [cells(quantity, route, (family, SMALL, c, torch.float64)) for c in conditions]
            rows.append(["" if i else family, route.name, *found])
    return table(["operator", "", *(f"{c:.0e}" for c in conditions)], rows)


def over_scale(cells: Cells, families: list[str], quantity: str, scales: dict[int, tuple[int, ...]]) -> str:
    """One quantity of ``c P`` for powers c of two, at one condition."""
    by_name = {size: {route.name: route for route in routes(size)} for size in scales}
    rows = []
    for family in families:
        print(f"scale, {quantity}: {family}", file=sys.stderr)
        for i, name in enumerate(dict.fromkeys(name for found in by_name.values() for name in found)):
            row = ["" if i else family, name]
            for size, powers in scales.items():
                route = by_name[size].get(name)
                setting = (family, size, SCALED_CONDITION, torch.float64)
                row += ["" if route is None else cells(quantity, route, setting, power) for power in powers]
            rows.append(row)
    head = [f"{size:,} rows, 2<sup>{power}</sup>" for size, powers in scales.items() for power in powers]
    return table(["operator", "", *head], rows)


def everything(
    cells: Cells, families: list[str], conditions: dict[tuple[int, str], tuple[float, ...]]
) -> str:
    """For each family all quantities at all sizes, dtypes and conditions, folded."""
    parts = []
    for family in families:
        content = []
        for (size, dtype), values in conditions.items():
            print(f"everything: {family}, {size} rows, {dtype}", file=sys.stderr)
            rows = []
            for condition in values:
                for i, route in enumerate(routes(size)):
                    found = at(cells, family, size, condition, DTYPES[dtype], route)
                    rows.append(["" if i else f"{condition:.0e}", route.name, *found])
            content.append(
                f"**{size:,} rows, {dtype}**\n\n" + table(["condition", "", *QUANTITIES.values()], rows)
            )
        parts.append(folded(family, "\n\n".join(content)))
    return "\n".join(parts)


def environment() -> str:
    """Versions, and the machine."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"curvlin of this checkout, {found}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s)."
    )


def pages(quick: bool) -> dict[str, str]:
    """Every table by the name of its markers."""
    cells, families = Cells(), list(FAMILIES)
    if quick:
        return {
            "versions": environment(),
            "summary": summary(cells, families, SMALL, 1e4),
            "scale_logdet": over_scale(cells, families[:2], "logdet", {SMALL: (-40, 40)}),
        }
    small = CONDITIONS[SMALL, "float64"]
    return {
        "versions": environment(),
        "summary": summary(cells, families, LARGE, 1e6),
        "condition_solve": over_condition(cells, families, "solve", small),
        "condition_logdet": over_condition(cells, families, "logdet", small),
        "scale_solve": over_scale(cells, families, "solve", SCALES),
        "scale_logdet": over_scale(cells, families, "logdet", SCALES),
        "everything": everything(cells, families, CONDITIONS),
    }


def write(page: Path, tables: dict[str, str]) -> None:
    """Put each table between ``<!-- accuracy: NAME -->`` and ``<!-- /accuracy: NAME -->``."""
    text = page.read_text()
    for name, content in tables.items():
        marked = re.compile(f"(<!-- accuracy: {name} -->\n).*?(<!-- /accuracy: {name} -->)", re.S)
        text, count = marked.subn(lambda m, content=content: f"{m[1]}\n{content}\n\n{m[2]}", text)
        if count != 1:
            raise SystemExit(f"{page} must hold the markers of {name!r} once, found {count}")
    page.write_text(text)


def main(arguments: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", type=Path, help="page to write the tables into")
    parser.add_argument("--quick", action="store_true", help="small operators in one setting")
    options = parser.parse_args(arguments)
    if options.write and options.quick:
        parser.error("--write needs all tables; leave out --quick")
    warnings.filterwarnings("ignore")
    tables = pages(options.quick)
    if options.write:
        write(options.write, tables)
    else:
        for name, content in tables.items():
            print(f"\n== {name}\n\n{content}")
    return tables


if __name__ == "__main__":
    main()
