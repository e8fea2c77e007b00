"""The same numbers as laplace-torch 0.3 where it is right: written down, and side by side where it is installed.

Convolutions are compared with our own oracle in `test_laplace`.
"""

import json
from collections.abc import Callable

import pytest
import torch
from laplace_torch_reference import BRIDGES, CASES, CLASSIFIERS, FILE, Case, answers, bridged
from torch import Tensor

from curvlin_nn import Laplace

# Relative to the norm. Both compute in float64, but for laplace-torch's full matrix, whose products pass float32.
TOLERANCES = {"full": 1e-6, "kron": 1e-9, "diag": 1e-9}
Question = Callable[[type[Laplace], Case], dict[str, Tensor]]
REFERENCE = json.loads(FILE.read_text())
QUESTIONS = [(answers, case) for case in CASES] + [(bridged, case) for case in CLASSIFIERS]
NAMES = [f"{ask.__name__}: {case.name}" for ask, case in QUESTIONS]


def written(ask: Question, case: Case) -> dict[str, Tensor]:
    return {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in REFERENCE[case.name].items()
        if (name in BRIDGES) == (ask is bridged)
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = float((found[name] - value).norm() / value.norm())
        assert difference < TOLERANCES[case.structure], f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(("ask", "case"), QUESTIONS, ids=NAMES)
def test_answers_equal_what_laplace_torch_wrote_down(ask, case):
    assert_equal(ask(Laplace, case), written(ask, case), case)


@pytest.mark.parametrize(("ask", "case"), QUESTIONS, ids=NAMES)
def test_answers_equal_laplace_torch_side_by_side(ask, case):
    laplace = pytest.importorskip(
        "laplace", reason="laplace-torch is not installed; its numbers are in data/laplace_torch_0.3.json"
    )
    theirs = ask(laplace.Laplace, case)
    assert_equal(ask(Laplace, case), theirs, case)
    assert_equal(theirs, written(ask, case), case)  # what is written down is what they answer


def test_answers_differ_between_cases():
    """By far more than what they may differ between libraries: a wrong structure, subset or link would be seen."""
    evidences = torch.tensor([REFERENCE[case.name]["log_marginal_likelihood"] for case in CASES])
    assert float(evidences.sort().values.diff().min()) > 1e-2
    for case in CLASSIFIERS:
        p = torch.stack([*written(bridged, case).values(), written(answers, case)["probit"]])
        gaps = (p[:, None] - p).abs().amax((2, 3))
        assert float(gaps[gaps > 0].min()) > 1e-3
        assert int((gaps > 0).sum()) == 6
