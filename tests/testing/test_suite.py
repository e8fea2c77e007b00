"""The pytest plugin: a marked function or class becomes one test for each law and dtype."""

import subprocess
import sys

import pytest

from curvlin.testing import LAWS, operator_suite

OPERATORS = """
import pytest
import torch
from curvlin import Diagonal
from curvlin.testing import operator_suite

class Jittered(Diagonal):
    def _solve(self, X, factors):
        return X / (self.values + 1e-6).unsqueeze(-1)

def spectrum(size, log10cond, generator):
    values = torch.logspace(0, -log10cond, size, dtype=torch.float64)
    return values[torch.randperm(size, generator=generator)]

def matrix(P):
    return torch.diag(P.values)

def make(size, log10cond, generator):
    return Diagonal(spectrum(size, log10cond, generator))
"""


def test_a_class_gets_one_test_for_each_law_and_dtype(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        OPERATORS
        + """
@operator_suite(make, dense=matrix, sizes=[4], conditions=[10.0])
class TestDiagonal:
    def test_of_its_own(self):
        assert make(3, 0.0, torch.Generator()).size == 3
"""
    )
    result = pytester.runpytest("-p", "pytest_curvlin")
    result.assert_outcomes(passed=2 * len(LAWS) + 1)


def test_a_function_is_replaced_by_its_tests_and_marks_go_along(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        OPERATORS
        + """
@pytest.mark.skipif(False, reason="kept")
@pytest.mark.operator_suite(dense=matrix, laws=["solve", "scale"], dtypes=[torch.float64])
def jittered(size, log10cond, generator):
    return Jittered(spectrum(size, log10cond, generator))
"""
    )
    result = pytester.runpytest("-p", "pytest_curvlin", "-v")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "*::jittered[[]solve-float64[]] FAILED*",
            "*laws violated: solve",
            "*smallest case found:*",
            "*from test_a_function_is_replaced_by_its_tests_and_marks_go_along import jittered*",
            "*P = jittered(size=1, log10cond=0.0, generator=torch.Generator().manual_seed(0)).to(torch.float64)*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_laws_are_chosen_by_k_and_skipped_by_marks(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        OPERATORS
        + """
@pytest.mark.skip(reason="later")
@pytest.mark.operator_suite
def healthy(size, generator):
    return Diagonal(spectrum(size, 1.0, generator))
"""
    )
    result = pytester.runpytest("-p", "pytest_curvlin", "-k", "scale and float32")
    result.assert_outcomes(skipped=1, deselected=2 * len(LAWS) - 1)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("@pytest.mark.operator_suite\nclass TestX: pass", "*a class needs make_op=*"),
        ("@pytest.mark.operator_suite(make_op=make)\ndef other(): pass", "*leave make_op out*"),
        ("@pytest.mark.operator_suite(make_op=make)\nclass Mine(Diagonal): pass", "*not the operator*"),
    ],
)
def test_a_marker_in_the_wrong_place_says_where_it_goes(
    pytester: pytest.Pytester, code: str, message: str
) -> None:
    pytester.makepyfile(OPERATORS + code)
    result = pytester.runpytest("-p", "pytest_curvlin")
    result.stdout.fnmatch_lines([message])
    assert result.ret != 0


def test_arguments_are_checked_where_they_are_written() -> None:
    with pytest.raises(TypeError, match="colour"):
        operator_suite(colour="red")


def test_the_plugin_imports_nothing_until_it_meets_the_marker() -> None:
    code = "import sys, pytest_curvlin; print(sorted({'torch', 'hypothesis', 'curvlin'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
