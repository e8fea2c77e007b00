"""The training of a variational posterior: steps over batches, held-out scores, and the best state.

What is trained are tensors in the hands of an optimiser; here is nothing that knows what they mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from curvlin._check import positive_integer
from curvlin_nn.batches import batches
from curvlin_nn.errors import DataError, TrainingDivergedError

Loss = Callable[[Any, Tensor, str], Tensor]
"""``(inputs, targets, what to call this batch) -> what is minimised``; `FloatingPointError` where it is no number."""

Score = Callable[[], float]
"""Of the present state, on held-out data; smaller is better."""

clock: Callable[[], float] = time.perf_counter
"""What `max_seconds` is measured by."""


@dataclass(frozen=True)
class TrainingOptions:
    """How long to train.

    Attributes:
        n_steps: the most steps.
        every: how many steps there are between two evaluations.
        patience: how many held-out scores in a row may be no better than the best before the training ends; None for
            any number.
        max_seconds: after which it ends as well; None for no such limit.

    Raises:
        TypeError: if a number is no integer.
        ValueError: if a number is out of its range.
    """

    n_steps: int
    every: int = 100
    patience: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("n_steps", "every"):
            positive_integer(name, getattr(self, name))
        if self.patience is not None:
            positive_integer("patience", self.patience)
        if self.max_seconds is not None:
            positive("max_seconds", self.max_seconds)


def positive(name: str, value: float) -> float:
    """A number above zero.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, found {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, found {value}")
    return float(value)


@dataclass
class TrainingHistory:
    """How a training went, evaluation by evaluation.

    Attributes:
        steps: at which there was an evaluation; the first is 0, before any.
        seconds: since the beginning.
        losses: the mean training loss since the evaluation before; NaN at the beginning.
        scores: on held-out data; empty where there are none.
        best_step: whose state was kept: that of the best score, or the last.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best_step: int = 0


def train(
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    loader: Iterable[Any],
    device: torch.device,
    options: TrainingOptions,
    *,
    score: Score | None = None,
    history: TrainingHistory | None = None,
    description: str = "training",
    progress_bar: bool = False,
) -> TrainingHistory:
    """Minimise a loss over the batches of a loader, which is gone through as often as it takes.

    The optimiser's tensors end in the best state: that of the best score, or without one the last. They end in one
    after a divergence, too; then, without a score, in that of the last evaluation. Whoever hands in tensors of their
    own, and takes them over at the end, has lost nothing if anything else raises.

    Args:
        optimizer: holds what is trained.
        loss: of a batch, an unbiased estimate of that of all data.
        loader: batches ``(inputs, targets)``.
        device: where the targets go.
        options: how long.
        score: of the state on held-out data; None for none.
        history: where to write how it goes; None for a new one.
        description: what to call this in the progress bar.
        progress_bar: whether to show one.

    Returns:
        How it went.

    Raises:
        DataError: if the loader yields nothing, in the first pass or a later one.
        TrainingDivergedError: if a loss, a gradient or a score is not finite.
    """
    history = TrainingHistory() if history is None else history
    return _Training(optimizer, options, score, history).run(loss, loader, device, description, progress_bar)


def no_batches(again: bool) -> DataError:
    """What to raise of a loader that yields nothing, or nothing again."""
    return DataError(
        f"the loader yielded no batch{' again' if again else ''}, expected at least one (inputs, targets) in every "
        "pass; give one that can be iterated several times"
    )


def passes(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[str, Any, Tensor]]:
    """The batches of a loader, again and again: what to call each, its inputs and its targets.

    Raises:
        DataError: if there are none.
    """
    n_passes = 0
    while True:
        empty = True
        for index, (x, targets) in enumerate(batches(loader, device)):
            empty = False
            yield f"batch {index}", x, targets
        if empty:
            raise no_batches(again=n_passes > 0)
        n_passes += 1


class _Training:
    """A training under way."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: TrainingOptions,
        score: Score | None,
        history: TrainingHistory,
    ) -> None:
        self._optimizer, self._options, self._score = optimizer, options, score
        self._tensors: list[Tensor] = [t for group in optimizer.param_groups for t in group["params"]]
        self._began = clock()
        self.history = history
        self._step = 0
        self._losses: list[float] = []
        self._best: list[Tensor] = []
        self._best_score, self._since_best = math.inf, 0

    def run(
        self,
        loss: Loss,
        loader: Iterable[Any],
        device: torch.device,
        description: str,
        progress_bar: bool,
    ) -> TrainingHistory:
        """See `train`."""
        options = self._options
        data = passes(loader, device)
        try:
            self._evaluate()
            with tqdm(total=options.n_steps, desc=description, disable=not progress_bar) as bar:
                while not self._at_end():
                    self._take_step(loss, next(data))
                    bar.update()
                    if self._step % options.every == 0:
                        self._evaluate()
                        bar.set_postfix(self._latest())
            if self.history.steps[-1] != self._step:
                self._evaluate()
        except FloatingPointError as error:
            self._restore()
            raise TrainingDivergedError(self._step, str(error)) from error
        self._restore()
        return self.history

    def _at_end(self) -> bool:
        options = self._options
        return (
            self._step >= options.n_steps
            or (options.max_seconds is not None and clock() - self._began >= options.max_seconds)
            or (options.patience is not None and self._since_best >= options.patience)
        )

    def _take_step(self, loss: Loss, batch: tuple[str, Any, Tensor]) -> None:
        where, x, targets = batch
        self._step += 1
        with torch.inference_mode(False), torch.enable_grad():
            self._optimizer.zero_grad()
            value = loss(x, targets, where)
            if not bool(torch.isfinite(value.detach())):
                raise FloatingPointError(f"found a loss of {float(value.detach())} on {where}")
            value.backward()
        if not all(bool(torch.isfinite(t.grad).all()) for t in self._tensors if t.grad is not None):
            raise FloatingPointError(f"found a gradient that is not finite on {where}")
        self._losses.append(float(value.detach()))
        self._optimizer.step()

    def _evaluate(self) -> None:
        if not all(bool(torch.isfinite(t.detach()).all()) for t in self._tensors):
            raise FloatingPointError("found a parameter that is not finite")
        history = self.history
        if self._score is not None:
            found = self._score()
            if not math.isfinite(found):
                raise FloatingPointError(f"found a held-out score of {found}")
            history.scores.append(found)
        history.steps.append(self._step)
        history.seconds.append(clock() - self._began)
        history.losses.append(sum(self._losses) / len(self._losses) if self._losses else math.nan)
        self._losses = []
        if self._score is not None:
            self._since_best += 1
            if found >= self._best_score:
                return
            self._best_score, self._since_best = found, 0
        history.best_step = self._step
        self._best = [t.detach().clone() for t in self._tensors]

    def _latest(self) -> dict[str, str]:
        history = self.history
        latest = {"loss": f"{history.losses[-1]:.4g}"}
        return latest | ({"held-out": f"{history.scores[-1]:.4f}"} if history.scores else {})

    @torch.no_grad()
    def _restore(self) -> None:
        for tensor, best in zip(self._tensors, self._best, strict=False):
            tensor.copy_(best)
