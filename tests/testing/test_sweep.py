"""`condition_sweep` measures against arbitrary precision and prints tables."""

import math

import pytest
import torch

from curvlin import Diagonal
from curvlin.testing import condition_sweep


def diagonal(size: int, log10cond: float, generator: torch.Generator) -> Diagonal:
    values = torch.logspace(0, -log10cond, size, dtype=torch.float64)
    return Diagonal(values[torch.randperm(size, generator=generator)])


def test_errors_grow_with_the_condition_and_stay_at_rounding_where_they_should() -> None:
    sweep = condition_sweep("dense", [1e2, 1e8], [torch.float64], size=8)
    assert [row.condition for row in sweep.rows] == [1e2, 1e8]
    mild, harsh = (row.errors for row in sweep.rows)
    assert 0 < mild["inverse_diagonal"] < 1e-12
    assert mild["inverse_diagonal"] < harsh["inverse_diagonal"] < 1e-6
    assert harsh["inv_quad"] < 1e-13


def test_the_errors_are_those_of_an_operator_that_is_wrong_by_a_known_factor() -> None:
    """For 1.001 P in the place of P: solutions, energies and variances off by 0.001, log det by n log 1.001."""
    sweep = condition_sweep(diagonal, [1e3], dense=lambda P: 1.001 * torch.diag(P.values), size=5)
    for row in sweep.rows:
        tolerance = 1e-4 if row.dtype == torch.float32 else 1e-9
        for name in ("solve", "inv_quad", "inverse_diagonal"):
            assert row.errors[name] == pytest.approx(0.001, rel=10 * tolerance), name
        assert row.errors["logdet"] == pytest.approx(5 * math.log(1.001), rel=tolerance * 10)


def test_a_matrix_that_float32_cannot_hold_has_no_error() -> None:
    sweep = condition_sweep("kronecker", [1e12], [torch.float32])
    assert math.isnan(sweep.rows[0].errors["solve"])
    assert "not PD" in str(sweep) and "not PD" in sweep.to_latex()


def test_tables_for_the_screen_for_markdown_and_for_latex() -> None:
    sweep = condition_sweep("diagonal", [1e2, 1e6], [torch.float64], draws=1)
    head, *rows = str(sweep).splitlines()
    assert head.split() == ["dtype", "condition", "solve", "inv_quad", "logdet", "inverse_diagonal"]
    assert [row.split()[:2] for row in rows] == [["float64", "1e+02"], ["float64", "1e+06"]]
    assert sweep.to_markdown().splitlines()[1] == "| :--- | ---: | ---: | ---: | ---: | ---: |"
    latex = sweep.to_latex()
    assert latex.startswith("\\begin{tabular}{lrrrrr}\n\\toprule\n") and r"inv\_quad" in latex
    error = sweep.rows[0].errors["inv_quad"]
    if error > 0:
        digits, exponent = f"{error:.1e}".split("e")
        assert rf"${digits} \cdot 10^{{{int(exponent)}}}$" in latex
    assert latex.count(r" \\") == 3 and "e-" not in latex


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(TypeError, match="must take condition or log10cond"):
        condition_sweep(lambda size: Diagonal(torch.ones(size)))
    with pytest.raises(ValueError, match="size must be at most 60"):
        condition_sweep("dense", size=61)
