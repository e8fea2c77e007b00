"""The table as text, as CSV and as a page of the documentation."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from table1 import published

Result = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A mean over seeds, with its standard error where there are several."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        return cls(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def shown(self, digits: int) -> str:
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


Column = tuple[str, Callable[[Result], float | None], int]
"""Heading, value and digits."""


def score(name: str) -> Callable[[Result], float | None]:
    return lambda result: result["scores"][name]


def as_published(name: str) -> Callable[[Result], float | None]:
    """The same by the conventions of the paper's script, as far as they are known of a result."""
    return lambda result: result["scores"].get(f"{name}, as published", result["scores"][name])


MAIN: tuple[Column, ...] = (
    ("ACC %", score("ACC"), 2),
    ("NLL", score("NLL"), 4),
    ("NLL - MAP", lambda result: result["NLL minus MAP"]["mean"], 5),
    ("ECE", score("ECE"), 4),
    ("Brier", score("Brier"), 4),
    ("AUC KMNIST", score("AUC kmnist"), 3),
    ("Gaussian AUC KMNIST", score("Gaussian AUC kmnist"), 3),
    ("AUC MNIST", score("AUC mnist"), 3),
    ("Gaussian AUC MNIST", score("Gaussian AUC mnist"), 3),
)

COSTS: tuple[Column, ...] = (
    ("fit, s", lambda result: result["seconds"]["fit"], 0),
    ("predict 10,000 images, s", lambda result: result["seconds"]["predict 10,000"], 1),
    ("peak memory, MiB", lambda result: result["peak memory, MiB"], 0),
    ("prior precision", lambda result: result["options"].get("prior precision"), 1),
    ("allowed, s", lambda result: result["options"].get("seconds"), 0),
    ("steps", lambda result: result["options"].get("steps"), 0),
    ("best step", lambda result: result["options"].get("best step"), 0),
    ("kernel error", lambda result: result["options"].get("kernel error"), 3),
)

DIGITS = {"ACC": 2, "NLL": 4, "ECE": 4}


def by_row(found: Sequence[Result], order: Sequence[str]) -> dict[str, list[Result]]:
    """Results of all seeds by row, in the order of the table."""
    grouped = {name: [r for r in found if r["row"] == name] for name in order}
    return {name: results for name, results in grouped.items() if results}


def over_seeds(results: Iterable[Result], value: Callable[[Result], float | None]) -> Value | None:
    values = [v for result in results if (v := value(result)) is not None]
    return Value.of(values) if values else None


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines))


def columns_table(rows: dict[str, list[Result]], columns: Sequence[Column]) -> str:
    """Mean and standard error over seeds of each column."""
    lines = []
    for name, results in rows.items():
        values = ((over_seeds(results, value), digits) for _, value, digits in columns)
        lines.append([name] + ["–" if v is None else v.shown(digits) for v, digits in values])
    return _table(["method", *(heading for heading, *_ in columns)], lines)


def comparison_table(rows: dict[str, list[Result]]) -> str:
    """Ours beside the paper's numbers, both with its conventions."""
    headings = ["method"]
    for name in ("ACC %", "NLL", "ECE", "AUC, second softmax", "Gaussian AUC"):
        headings += [name, "paper"]
    lines = []
    for row, results in rows.items():
        paper = published.NUMBERS.get(row)
        cells = [row]
        for number, column in enumerate(published.COLUMNS):
            digits = DIGITS.get(column, 3)
            ours, theirs = over_seeds(results, as_published(column)), None if paper is None else paper[number]
            cells.append("–" if ours is None else ours.shown(digits))
            cells.append("–" if theirs is None else f"{theirs:.{digits}f}")
        lines.append(cells)
    return _table(headings, lines)


def tolerance_table(rows: dict[str, list[Result]]) -> str:
    """How far the rows that must be faithful are from the paper, in units of what is tolerated."""
    lines = []
    for row in published.FAITHFUL:
        if row not in rows:
            continue
        paper = dict(zip(published.COLUMNS, published.NUMBERS[row], strict=True))
        cells = [row]
        for column, tolerance in published.TOLERANCES.items():
            ours, theirs = over_seeds(rows[row], as_published(column)), paper[column]
            assert ours is not None and theirs is not None
            off = ours.mean - theirs
            cells.append(f"{off:+.4f} ({'within' if abs(off) <= tolerance else 'outside'} {tolerance})")
        lines.append(cells)
    return _table(["method", *published.TOLERANCES], lines)


def claim_table(rows: dict[str, list[Result]]) -> str:
    """Each part of the joint claim, row by row; differences to MAP are taken seed by seed."""
    reference = {result["seed"]: result["scores"] for result in rows.get("MAP", [])}
    lines = []
    for row, results in rows.items():
        paired = [result for result in results if result["seed"] in reference]
        if row == "MAP" or not paired:
            continue

        def gain(column: str, paired: list[Result] = paired) -> Value:
            return Value.of([r["scores"][column] - reference[r["seed"]][column] for r in paired])

        gaussian = over_seeds(paired, score("Gaussian AUC kmnist"))
        auc, ece = gain("AUC kmnist"), gain("ECE")
        nll = over_seeds(paired, lambda result: result["NLL minus MAP"]["mean"])
        assert nll is not None
        holds = [
            gaussian is not None and gaussian.mean >= published.LEAST_GAUSSIAN_AUC,
            auc.mean >= published.LEAST_GAIN_OF_AUC,
            nll.mean <= 0,
            ece.mean <= published.LARGEST_LOSS_OF_ECE,
        ]
        values = ["–" if gaussian is None else gaussian.shown(3), auc.shown(3), nll.shown(5), ece.shown(4)]
        cells = [f"{value} {'yes' if good else 'no'}" for value, good in zip(values, holds, strict=True)]
        lines.append([row, *cells, "**yes**" if all(holds) else "no"])
    headings = [
        "method",
        f"Gaussian AUC >= {published.LEAST_GAUSSIAN_AUC}",
        f"AUC - MAP >= {published.LEAST_GAIN_OF_AUC}",
        "NLL - MAP <= 0",
        f"ECE - MAP <= {published.LARGEST_LOSS_OF_ECE}",
        "all",
    ]
    return _table(headings, lines)


def as_csv(rows: dict[str, list[Result]]) -> str:
    """Every row and seed in full precision."""
    lines: list[dict[str, Any]] = []
    for name, results in rows.items():
        for result in results:
            line = {"method": name, "seed": result["seed"]} | result["scores"]
            line |= {f"NLL minus MAP, {key}": value for key, value in result["NLL minus MAP"].items()}
            line |= {heading: value(result) for heading, value, _ in COSTS}
            lines.append(line)
    file = io.StringIO()
    headings = dict.fromkeys(heading for line in lines for heading in line)
    writer = csv.DictWriter(file, list(headings), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
