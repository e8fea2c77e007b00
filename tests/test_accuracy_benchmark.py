"""`benchmarks/accuracy.py`: its truth against 80 digits of dense arithmetic, and our operators against its truth."""

import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from curvlin.testing import reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("accuracy", "_families", "_routes", "_truth")


@pytest.fixture(scope="module")
def accuracy():
    sys.path.insert(0, str(BENCHMARKS))
    import accuracy

    yield accuracy
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES:
        sys.modules.pop(name, None)


def families():
    sys.path.insert(0, str(BENCHMARKS))
    from _families import FAMILIES

    sys.path.remove(str(BENCHMARKS))
    return list(FAMILIES)


def dense_in_digits(problem):
    """The matrix of a problem as mpmath numbers, by the definition of its parts, entry for entry."""

    def exact(t):
        return np.vectorize(mpmath.mpf, otypes=[object])(t.double().numpy())

    with mpmath.workdps(80):
        N = problem.b.numel()
        P = np.full((N, N), mpmath.mpf(0), dtype=object)
        for A, B in problem.terms:
            P = P + np.kron(exact(A), exact(B))
        if problem.shift is not None:
            P = P + np.diag([exact(problem.shift).item()] * N)
        P = problem.factor * P
        if problem.d is not None:
            P = P + np.diag(exact(problem.d))
        if problem.blocks is not None:
            n = problem.blocks.shape[-1]
            for i, block in enumerate(problem.blocks):
                P[i * n : (i + 1) * n, i * n : (i + 1) * n] += exact(block)
        if problem.U is not None:
            U = exact(problem.U)
            P = P + U @ U.T
        return P


def gap(found, expected):
    found, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (found, expected))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", families())
def test_truth_is_that_of_dense_arithmetic_in_80_digits(accuracy, family):
    problem = accuracy.make(family, accuracy.SMALL, 1e8, torch.float64)
    found, expected = accuracy.truth(problem), reference(dense_in_digits(problem))
    assert gap(found.solve, expected.solve(problem.b)) < 1e-15
    assert gap(found.inv_quad, expected.inv_quad(problem.b)) < 1e-15
    assert gap(found.logdet, expected.logdet()) < 1e-15
    assert gap(found.inverse_diagonal, expected.inverse_diagonal()) < 1e-15
    # Gradients: by autograd of the dense matrix, at a condition where that has digits to spare.
    easy = accuracy.make(family, accuracy.SMALL, 1e2, torch.float64)
    leaves = tuple(t.clone().requires_grad_() for t in easy.inputs)
    P = easy.with_inputs(leaves).dense()
    objective = easy.b @ torch.linalg.solve(P, easy.b) + torch.logdet(P)
    for ours, autograd in zip(
        accuracy.truth(easy).gradients, torch.autograd.grad(objective, leaves), strict=True
    ):
        assert gap(accuracy.symmetrised(ours), accuracy.symmetrised(autograd)) < 1e-10


@pytest.mark.parametrize("family", families())
def test_truth_scales_with_the_matrix(accuracy, family):
    once = accuracy.truth(accuracy.make(family, accuracy.SMALL, 1e4, torch.float64)).scaled(2.0**40)
    again = accuracy.truth(accuracy.make(family, accuracy.SMALL, 1e4, torch.float64, 2.0**40))
    for name in ("solve", "inv_quad", "logdet", "inverse_diagonal"):
        assert gap(getattr(once, name), getattr(again, name)) < 1e-15
    eye = torch.eye(accuracy.SMALL, dtype=torch.float64)
    assert gap(once.inverse_root.mT @ again.root, eye) < 1e-12


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_ours_lose_no_more_than_the_condition(accuracy, family, condition):
    """Relative errors within a hundred times what the condition number alone costs; logdet per row."""
    (ours,) = (r for r in accuracy.routes(accuracy.SMALL) if r.name == "curvlin")
    problem = accuracy.make(family, accuracy.SMALL, condition, torch.float64)
    exact = accuracy.truth(problem)
    kappa = float(torch.linalg.cond(problem.dense()))
    allowed = 100 * kappa * torch.finfo(torch.float64).eps
    for quantity in accuracy.QUANTITIES:
        found = accuracy.error(quantity, accuracy.answer(quantity, ours, problem), exact)
        assert found < allowed * (accuracy.SMALL if quantity == "logdet" else 1), quantity


def test_measure_of_samples_sees_a_missing_direction(accuracy):
    exact = accuracy.truth(accuracy.make(families()[0], accuracy.SMALL, 1e4, torch.float64))
    assert accuracy.variance_error(exact.inverse_root, exact.root) < 1e-12
    assert accuracy.variance_error(exact.inverse_root, exact.root[:, 1:]) == pytest.approx(1, abs=0.3)
    assert accuracy.variance_error(exact.inverse_root, 1.1 * exact.root) == pytest.approx(0.21, rel=1e-6)


def test_failures_are_shown_by_name_and_peers_are_optional(accuracy, monkeypatch):
    cells, setting = accuracy.Cells(), (families()[0], accuracy.SMALL, 1e2, torch.float64)
    missing, raising, slow, silent = (type("R", (accuracy.Ours,), {"name": n})() for n in "abcd")
    missing.available = False

    def fail(*_):
        raise ArithmeticError("no")

    def forever(*_):
        while True:
            pass

    def not_offered(*_):
        raise accuracy.NotOffered

    raising.logdet, slow.logdet, silent.logdet = fail, forever, not_offered
    monkeypatch.setattr(accuracy, "LIMIT", 0.05)
    assert cells("logdet", missing, setting) == "not installed"
    assert cells("logdet", raising, setting) == "`ArithmeticError`"
    assert cells("logdet", slow, setting) == "> 0.05 s"
    assert cells("logdet", silent, setting) == "–"


def test_tables_are_written_between_their_markers(accuracy, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- accuracy: x -->\nold\n<!-- /accuracy: x -->\nb\n")
    accuracy.write(page, {"x": "| new |"})
    assert page.read_text() == "a\n<!-- accuracy: x -->\n\n| new |\n\n<!-- /accuracy: x -->\nb\n"
    with pytest.raises(SystemExit, match="markers of 'y'"):
        accuracy.write(page, {"y": ""})


def test_page_holds_every_table_of_the_script(accuracy):
    text = (BENCHMARKS.parent / "docs" / "evidence.md").read_text()
    for name in (
        "versions",
        "summary",
        "condition_solve",
        "condition_logdet",
        "scale_solve",
        "scale_logdet",
        "everything",
    ):
        assert text.count(f"<!-- accuracy: {name} -->") == text.count(f"<!-- /accuracy: {name} -->") == 1
    for family in families():
        assert f'"{family}"' in text
