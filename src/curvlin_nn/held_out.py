"""The scalar prior precision that scores best on held-out data: by grid, by Brent's method, by cross-validation.

Only variances depend on the prior. Outputs and features of held-out data are computed once, and turned into the
eigenbasis of the curvature, where the posterior precision is diagonal: ``var = sum_i q_i^2 / (lambda_i + delta)``, for
all precisions that are tried in one product of matrices.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor
from tqdm import tqdm

from curvlin._check import positive_integer
from curvlin_nn.batches import Labelled, batches
from curvlin_nn.capture.inputs import select_samples
from curvlin_nn.capture.state import device_of, random_state, random_state_kept, set_random_state
from curvlin_nn.curvature import Accumulated
from curvlin_nn.errors import DataError, UnsupportedError
from curvlin_nn.evidence import Curvature
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.kept_features import Kept, View
from curvlin_nn.predictive.predictor import Answer, answer, needs_covariance
from curvlin_nn.predictive.request import Request, check_pred_type
from curvlin_nn.predictive.response import Response
from curvlin_nn.scores import new_score
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
        request: what to predict; each precision that is tried sees the same draws, also without a generator. Noise is
            added where the negative log-likelihood is scored.
        loss: see `curvlin_nn.scores.new_score`.
        progress_bar: whether to show one over the batches.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Laplace, Sequence[tuple[Any, Tensor]]]],
        request: Request,
        loss: object | None = None,
        progress_bar: bool = False,
    ) -> None:
        first = pairs[0][0]
        check_pred_type(request.pred_type, first._choice.in_function_space)
        self._new_score = new_score(first.likelihood, loss)
        self._generator, self._device = request.generator, device_of(first.model)
        self._progress_bar = progress_bar
        noise = loss is None and first.likelihood.has_additive_noise
        request = replace(request, observation_noise=noise).checked(first.likelihood)
        self._parts: list[_Part] = []
        for la, data in pairs:
            asked = copy.copy(la)
            asked._fitted = replace(la._fit, known_unchanged=True)  # `search` has compared the model
            if request.pred_type == "nn":
                self._parts += [_Sampled(asked, request, x, targets) for x, targets in data]
            else:
                view = View.of(asked)
                self._parts += [_Linearised(view, request, x, targets) for x, targets in data]

    def scores(self, precisions: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        """The score at each precision."""
        scores = [self._new_score() for _ in precisions]
        room = KEPT_BUDGET
        for part in tqdm(self._parts, desc="held-out batches", disable=not self._progress_bar):
            room -= part.keep(room)
            for answers, outputs, targets in part.answered(precisions):
                to_the_same_draws = self._returns()
                for score in scores:
                    to_the_same_draws()
                    score.update(next(answers), outputs, targets)
        return torch.tensor([score.value() for score in scores], dtype=torch.float64)

    def _returns(self) -> Callable[[], object]:
        """What sets the source of randomness back to where it is now."""
        if self._generator is None:
            return partial(set_random_state, self._device, random_state(self._device))
        return partial(self._generator.set_state, self._generator.get_state())


class _Part(ABC):
    """One batch."""

    @abstractmethod
    def keep(self, room: int) -> int:
        """Compute what fits into `room` entries, unless it is there already: how many there are."""

    @abstractmethod
    def answered(self, precisions: Float[Tensor, " G"]) -> Iterator[tuple[Iterator[Answer], Tensor, Tensor]]:
        """Some samples at a time: the answer at each precision, made when it is asked for; outputs; targets."""


@dataclass
class _Sampled(_Part):
    """Predictions of the network at draws of its weights."""

    la: Laplace
    request: Request
    x: Any
    targets: Tensor

    def keep(self, room: int) -> int:
        """See `_Part.keep`: nothing is the same for all precisions."""
        return 0

    def answered(self, precisions: Float[Tensor, " G"]) -> Iterator[tuple[Iterator[Answer], Tensor, Tensor]]:
        """See `_Part.answered`."""
        with torch.no_grad():
            outputs = self.la._fit.accumulated.recorder(self.x).outputs.detach()
        yield self._answers(precisions), outputs, self.targets

    def _answers(self, precisions: Float[Tensor, " G"]) -> Iterator[Answer]:
        for delta in precisions.tolist():
            self.la.prior_precision = delta
            yield self.la._predictor(self.request.pred_type)(self.x, self.request)


@dataclass
class _Linearised(_Part):
    """Predictions of the linearised network; outputs and features are kept where there is room."""

    view: View
    request: Request
    x: Any
    targets: Tensor
    kept: list[Kept] | None = None

    def keep(self, room: int) -> int:
        """See `_Part.keep`."""
        if self.kept is None:
            found, entries = [], 0
            for piece in self.view.pieces(self.x):
                found.append(piece)
                entries += piece.entries
                if entries > room:
                    return 0
            self.kept = found
        return sum(piece.entries for piece in self.kept)

    def answered(self, precisions: Float[Tensor, " G"]) -> Iterator[tuple[Iterator[Answer], Tensor, Tensor]]:
        """See `_Part.answered`."""
        start = 0
        for piece in self.view.pieces(self.x) if self.kept is None else self.kept:
            stop = start + len(piece.outputs)
            outputs = piece.outputs.reshape(-1, *piece.output_shape)
            yield self._answers(piece, precisions), outputs, self.targets[start:stop]
            start = stop

    def _answers(self, piece: Kept, precisions: Float[Tensor, " G"]) -> Iterator[Answer]:
        la = self.view.la
        response = Response(la.likelihood, lambda: piece.output_shape, la.sigma_noise.detach())
        variances = not needs_covariance(response, self.request)
        for spread in self.view.spreads(piece, precisions, variances=variances):
            yield answer(response, self.request, piece.outputs, spread)


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
    if la._choice.name == "hessian":
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
    choice = la._choice
    if not isinstance(choice.selection, (Subnetwork, FeatureMap)):  # the last layer has been found
        choice = replace(choice, selection=list(la.parameters.names))
    n_scales = la._fit.curvature.n_noise_scales
    found = [choice.accumulated(la.model, la.likelihood, samples, n_scales) for samples in dealt]
    return [(_without(la, found, fold), dealt[fold]) for fold in range(n_folds)]


def _without(la: Laplace, found: Sequence[Accumulated], fold: int) -> Laplace:
    others = [accumulated for k, accumulated in enumerate(found) if k != fold]
    total = replace(others[0], states=tuple(copy.deepcopy(state) for state in others[0].states))
    for other in others[1:]:
        total = total.merged(other)
    held = copy.copy(la)
    H = Curvature.of(total.states[0], damping=la._choice.damping)
    held._fitted = replace(la._fit, accumulated=total, curvature=H)
    return held


METHODS = ("gridsearch", "brent", "cv")
"""The methods of `Laplace.optimize_prior_precision` that score held-out data."""


@outside_inference_mode()
def search(
    la: Laplace,
    method: str,
    grid: Grid,
    request: Request,
    loss: object | None,
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
    held_out = HeldOut(pairs, request, loss, progress_bar and method != "brent")
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
