"""The loop that trains variational posteriors: what it keeps, when it ends, and what it says when it fails."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlin_nn.errors import DataError, TrainingDivergedError
from curvlin_nn.variational import training
from curvlin_nn.variational.training import TrainingOptions, train

CPU = torch.device("cpu")
DATA = [(torch.full((2, 1), float(k)), torch.zeros(2)) for k in range(3)]


def parabola() -> tuple[Tensor, torch.optim.SGD, Any]:
    """``w^2 / 2`` from w = 4, by steps that halve it."""
    w = torch.tensor(4.0, requires_grad=True)
    return w, torch.optim.SGD([w], 0.5), lambda x, targets, where: w.square() / 2


def test_without_a_score_the_last_state_stays_and_losses_are_means_between_evaluations() -> None:
    w, optimizer, loss = parabola()
    history = train(optimizer, loss, DATA, CPU, TrainingOptions(5, every=2))
    assert float(w.detach()) == 4 * 0.5**5
    assert history.steps == [0, 2, 4, 5] and history.best_step == 5 and history.scores == []
    assert history.losses[1] == (8 + 2) / 2  # of w = 4 and w = 2


def test_the_state_of_the_best_score_stays_and_patience_ends_the_training() -> None:
    w, optimizer, loss = parabola()
    scores = iter([3.0, 1.0, 2.0, 1.0])
    options = TrainingOptions(100, every=1, patience=2)
    history = train(optimizer, loss, DATA, CPU, options, score=lambda: next(scores))
    assert history.best_step == 1 and float(w.detach()) == 2
    assert history.steps == [0, 1, 2, 3]  # an equal score is no better


def test_batches_come_in_order_again_and_again() -> None:
    seen = []
    w, optimizer, _ = parabola()

    def loss(x: Any, targets: Tensor, where: str) -> Tensor:
        seen.append((where, float(x[0])))
        return w * 0

    train(optimizer, loss, DATA, CPU, TrainingOptions(5))
    assert seen == [(f"batch {k}", float(k)) for k in (0, 1, 2, 0, 1)]


def test_seconds_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(training, "clock", lambda: float(next(ticks)))
    _, optimizer, loss = parabola()
    history = train(optimizer, loss, DATA, CPU, TrainingOptions(1000, every=1000, max_seconds=10.0))
    assert 0 < history.steps[-1] < 11


@pytest.mark.parametrize("what", ["loss", "gradient", "parameter", "score"])
def test_numbers_that_are_not_finite_name_the_step_and_leave_the_best_state(what: str) -> None:
    w, optimizer, _ = parabola()
    steps = itertools.count(1)

    def loss(x: Any, targets: Tensor, where: str) -> Tensor:
        value = w.square() / 2
        if next(steps) < 6:
            return value
        if what == "loss":
            return value * torch.nan
        if what == "gradient":
            return value + (w - w.detach()).abs().sqrt()  # 0, with an infinite slope
        if what == "parameter":
            optimizer.param_groups[0]["lr"] = torch.inf
        return value

    def score() -> float:
        return torch.nan if what == "score" and float(w.detach()) < 4 * 0.5**5 else float(w.detach())

    held_out = score if what == "score" else None
    with pytest.raises(TrainingDivergedError, match="step 6") as found:
        train(optimizer, loss, DATA, CPU, TrainingOptions(6, every=2), score=held_out)
    assert found.value.step == 6
    assert float(w.detach()) == 4 * 0.5**4  # of the evaluation before


def test_a_loader_that_ends_is_named() -> None:
    _, optimizer, loss = parabola()
    with pytest.raises(DataError, match="no batch, expected"):
        train(optimizer, loss, [], CPU, TrainingOptions(5))
    with pytest.raises(DataError, match="no batch again"):
        train(optimizer, loss, iter(DATA), CPU, TrainingOptions(5))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"n_steps": 0}, ValueError),
        ({"n_steps": 1.5}, TypeError),
        ({"n_steps": 1, "every": 0}, ValueError),
        ({"n_steps": 1, "patience": 0}, ValueError),
        ({"n_steps": 1, "max_seconds": 0.0}, ValueError),
        ({"n_steps": 1, "max_seconds": float("nan")}, ValueError),
        ({"n_steps": 1, "max_seconds": "1"}, TypeError),
    ],
)
def test_options_are_checked(options: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=list(options)[-1]):
        TrainingOptions(**options)
