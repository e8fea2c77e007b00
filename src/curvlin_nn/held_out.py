"""The scalar prior precision that scores best on held-out data: by grid, by Brent's method, by cross-validation.

Only variances depend on the prior. Outputs and features of held-out data are computed once, and turned into the
eigenbasis of the curvature, where the posterior precision is diagonal; each precision that is tried then costs one
quadratic form, ``var = sum_i q_i^2 / (lambda_i + delta)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor
from tqdm import tqdm

from curvlin._check import positive_integer
from curvlin_nn.batches import Labelled, batches
from curvlin_nn.capture.inputs import select_samples
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.curvature import Accumulated, accumulate
from curvlin_nn.errors import DataError, UnsupportedError
from curvlin_nn.evidence import Curvature
from curvlin_nn.kept_features import Kept, View
from curvlin_nn.scores import Score, new_score
from curvlin_nn.subnetwork_space import Subnetwork

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace

KEPT_BUDGET = 2**27
"""Entries of the features that are kept between tries: 512 MiB in float32; the others are computed again."""


@dataclass(frozen=True)
class HeldOutOptimum:
    """The prior precision that scores best on held-out data.

    Attributes:
        prior_precision: the best that was tried.
        score: its score; smaller is better.
        precisions: all that were tried, in increasing order.
        scores: theirs.
        at_edge: whether the best is the first or last of what was allowed, so that the optimum may lie beyond.
    """

    prior_precision: float
    score: float
    precisions: Float[Tensor, " G"]
    scores: Float[Tensor, " G"]
    at_edge: bool


@dataclass(frozen=True)
class Scoring:
    """What to predict, and how to score it.

    Attributes:
        loss: see `curvlin_nn.scores.new_score`.
        pred_type: as in `Laplace.__call__`.
        link_approx: likewise.
        n_samples: likewise.
        generator: likewise; each precision that is tried sees the same draws.
    """

    loss: object | None = None
    pred_type: str = "glm"
    link_approx: str = "probit"
    n_samples: int = 100
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Grid:
    """``base**u`` for u between two bounds.

    Attributes:
        low: the least u.
        high: the largest.
        size: how many for a grid.
        base: of the logarithm.
    """

    low: float
    high: float
    size: int
    base: float

    def __post_init__(self) -> None:
        positive_integer("grid_size", self.size)
        if not (self.low < self.high and self.base > 1):
            raise ValueError(
                f"the grid must have log_prior_prec_min < log_prior_prec_max and a base above 1, found {self.low}, "
                f"{self.high} and {self.base}"
            )

    @property
    def precisions(self) -> Float[Tensor, " G"]:
        """All of them, in increasing order."""
        return torch.logspace(self.low, self.high, self.size, self.base, dtype=torch.float64)


class HeldOut:
    """Posteriors with the data that each is scored on; together they have one score at each prior precision.

    Args:
        pairs: fitted objects, and batches that they have not been fitted to.
        request: what to predict.
        progress_bar: whether to show one over the precisions that are tried.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Laplace, Sequence[tuple[Any, Tensor]]]],
        request: Scoring,
        progress_bar: bool = False,
    ) -> None:
        first = pairs[0][0]
        self._new_score = new_score(first.likelihood, request.loss)
        self._noise = request.loss is None and first.likelihood.has_additive_noise
        self._request, self._progress_bar = request, progress_bar
        self._parts: list[_Part] = []
        for la, data in pairs:
            asked = copy.copy(la)
            asked._fitted = replace(la._fit, known_unchanged=True)  # `search` has compared the model
            view = None if request.pred_type == "nn" else View.of(asked)
            self._parts += [_Part(asked, view, x, targets) for x, targets in data]

    def scores(self, precisions: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        """The score at each precision."""
        tried = [(float(delta), self._new_score()) for delta in precisions]
        room = KEPT_BUDGET
        for part in tqdm(self._parts, desc="held-out batches", disable=not self._progress_bar):
            part.keep(room)
            room -= part.kept_entries
            for la, x, outputs, targets in part:
                self._update(tried, la, x, outputs, targets)
        return torch.tensor([score.value() for _, score in tried], dtype=torch.float64)

    def _update(
        self, tried: list[tuple[float, Score]], la: Laplace, x: Any, outputs: Tensor, targets: Tensor
    ) -> None:
        generator = self._request.generator
        state = None if generator is None else generator.get_state()
        for delta, score in tried:
            if generator is not None and state is not None:
                generator.set_state(state)
            la.prior_precision = delta
            prediction = la(
                x,
                pred_type=self._request.pred_type,
                link_approx=self._request.link_approx,
                n_samples=self._request.n_samples,
                generator=generator,
                observation_noise=self._noise,
            )
            score.update(prediction, outputs, targets)


class _Part:
    """One batch; its outputs and features are kept where there is room."""

    def __init__(self, la: Laplace, view: View | None, x: Any, targets: Tensor) -> None:
        self._la, self._view, self._x, self._targets = la, view, x, targets
        self._kept: list[Kept] | None = None
        self.kept_entries = 0

    def keep(self, room: int) -> None:
        """Compute what fits into `room` entries, unless it is there already."""
        if self._kept is not None or self._view is None:
            return
        kept: list[Kept] = []
        for piece in self._view.pieces(self._x):
            self.kept_entries += piece.entries
            if self.kept_entries > room:
                self.kept_entries = 0
                return
            kept.append(piece)
        self._kept = kept

    def __iter__(self) -> Iterator[tuple[Laplace, Any, Tensor, Tensor]]:
        """The posterior to ask, what to ask it, outputs and targets."""
        if self._view is None:
            with torch.no_grad():
                outputs = self._la._fit.accumulated.recorder(self._x).outputs.detach()
            yield self._la, self._x, outputs, self._targets
            return
        start = 0
        for piece in self._kept if self._kept is not None else self._view.pieces(self._x):
            stop = start + len(piece.outputs)
            outputs = piece.outputs.reshape(-1, *self._la._fit.accumulated.output_shape)
            yield self._view.la, piece, outputs, self._targets[start:stop]
            start = stop


def held_out_data(la: Laplace, loader: Iterable[Any] | None, method: str) -> list[tuple[Any, Tensor]]:
    """The batches, kept: every precision is scored on the same data.

    Raises:
        UnsupportedError: if there is no loader.
        DataError: if it yields nothing.
    """
    name = "train_loader" if method == "cv" else "val_loader"
    if loader is None:
        raise UnsupportedError(
            f"method={method!r} needs {name}, batches (inputs, targets) or mappings; found None"
        )
    device = device_of(la.model)
    with random_state_kept(device):
        data = list(batches(Labelled(loader, la.dict_key_y), device))
    if not data:
        raise DataError(f"{name} yielded no batch, expected at least one (inputs, targets)")
    return data


def folds(la: Laplace, data: Sequence[tuple[Any, Tensor]], n_folds: int) -> list[tuple[Laplace, Any]]:
    """For each fold the posterior without its curvature, and its data.

    Every batch deals its samples to the folds in turn. The parameters were trained on all of them: only the curvature
    is held out.

    Raises:
        UnsupportedError: if the states of the structure do not merge, or the curvature is a Hessian.
        DataError: if there are fewer samples than folds.
    """
    if la._hessian is not None:
        raise UnsupportedError("method='cv' is not served for curvature='hessian'; use curvature='ggn'")
    if positive_integer("n_folds", n_folds) < 2:
        raise ValueError(f"n_folds must be at least 2, found {n_folds}")
    if n_folds > 2:
        try:
            la._fit.accumulated.check_mergeable()
        except UnsupportedError as error:
            raise UnsupportedError(
                f"method='cv' with n_folds={n_folds} adds the sums over several folds, and those of this "
                "hessian_structure do not add, expected one whose do; take n_folds=2, or 'kron'"
            ) from error
    dealt: list[list[tuple[Any, Tensor]]] = [[] for _ in range(n_folds)]
    seen = 0
    for x, targets in data:
        n = len(targets)
        for fold, samples in enumerate(dealt):
            places = range((fold - seen) % n_folds, n, n_folds)
            if places:
                index = torch.tensor(places, device=targets.device)
                samples.append((select_samples(x, index, n), targets[index]))
        seen += n
    if seen < n_folds:
        raise DataError(f"cross-validation with {n_folds} folds needs as many samples, found {seen}")
    chosen: Any = la.feature_map
    if chosen is None:  # the last layer has been found
        chosen = la._selection if isinstance(la._selection, Subnetwork) else list(la.parameters.names)
    factories, reduction = la._summed(continued=True), la.feature_reduction
    found = [
        accumulate(
            la.model,
            la.likelihood,
            samples,
            chosen,
            factories,
            columns=la._columns,
            feature_reduction=reduction,
        )
        for samples in dealt
    ]
    return [(_without(la, found, fold), dealt[fold]) for fold in range(n_folds)]


def _without(la: Laplace, found: Sequence[Accumulated], fold: int) -> Laplace:
    others = [accumulated for k, accumulated in enumerate(found) if k != fold]
    total = replace(others[0], states=tuple(copy.deepcopy(state) for state in others[0].states))
    for other in others[1:]:
        total = total.merged(other)
    held = copy.copy(la)
    H = Curvature.of(total.states[0], damping=la._damping)
    held._fitted = replace(la._fit, accumulated=total, curvature=H)
    return held


METHODS = ("gridsearch", "brent", "cv")
"""The methods of `Laplace.optimize_prior_precision` that score held-out data."""


def search(
    la: Laplace,
    method: str,
    grid: Grid,
    request: Scoring,
    loader: Iterable[Any] | None,
    *,
    n_folds: int,
    tolerance: float,
    progress_bar: bool = False,
) -> HeldOutOptimum:
    """The best scalar prior precision by a method of `METHODS`; `la` stays as it is.

    Raises:
        UnsupportedError: without data, or where the structure or likelihood cannot serve the method.
        DataError: for data that cannot be used.
    """
    la._check_unchanged()
    data = held_out_data(la, loader, method)
    pairs = folds(la, data, n_folds) if method == "cv" else [(la, data)]
    held_out = HeldOut(pairs, request, progress_bar and method != "brent")
    return by_brent(held_out, grid, tolerance) if method == "brent" else by_grid(held_out, grid)


def by_grid(held_out: HeldOut, grid: Grid) -> HeldOutOptimum:
    """The best of the grid."""
    precisions = grid.precisions
    scores = held_out.scores(precisions)
    return _best(precisions, scores, lambda best: best in (0, len(precisions) - 1))


def by_brent(held_out: HeldOut, grid: Grid, tolerance: float) -> HeldOutOptimum:
    """A local minimum between the bounds by Brent's method, to `tolerance` in the logarithm."""
    tried: dict[float, float] = {}

    def score(u: float) -> float:
        precision = float(grid.base**u)
        tried[precision] = float(held_out.scores(torch.tensor([precision], dtype=torch.float64)))
        return tried[precision]

    minimize_scalar(score, bounds=(grid.low, grid.high), method="bounded", options={"xatol": tolerance})
    precisions = torch.tensor(sorted(tried), dtype=torch.float64)
    scores = torch.tensor([tried[float(p)] for p in precisions], dtype=torch.float64)
    low, high = grid.base ** (grid.low + 2 * tolerance), grid.base ** (grid.high - 2 * tolerance)
    return _best(precisions, scores, lambda best: not low < float(precisions[best]) < high)


def _best(precisions: Tensor, scores: Tensor, at_edge: Callable[[int], bool]) -> HeldOutOptimum:
    usable = torch.where(scores.isnan(), torch.inf, scores)
    best = int(usable.argmin())
    if not bool(torch.isfinite(scores[best])):
        raise DataError(
            "no prior precision has a finite score on the held-out data; check its targets and the loss"
        )
    return HeldOutOptimum(float(precisions[best]), float(scores[best]), precisions, scores, at_edge(best))
