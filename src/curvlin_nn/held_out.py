"""The scalar prior precision that scores best on held-out data: by grid, by Brent's method, by cross-validation.

Only variances depend on the prior. Outputs and features of held-out data are computed once, and turned into the
eigenbasis of the curvature, where the posterior precision is diagonal: ``var = sum_i q_i^2 / (lambda_i + delta)``, for
all precisions that are tried in one product of matrices. Where no eigenbasis is known, the posterior is factored once
for each precision, and asked about all the data.
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
from curvlin_nn.kept_features import AtPrecisions, Kept, View
from curvlin_nn.predictive.predictor import Answer, answer, needs_covariance
from curvlin_nn.predictive.request import Request, check_pred_type
from curvlin_nn.predictive.response import Response
from curvlin_nn.scores import new_score
from curvlin_nn.subnetwork_space import Subnetwork

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace

KEPT_BUDGET = 2**26
"""Entries of the features that are kept between tries: 256 MiB in float32; the others are computed again."""

HELD_BUDGET = 2**26
"""Entries of the features, besides these, that one factorisation of a posterior is asked about."""


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
        progress_bar: whether to show one over the samples, each counted at each precision.
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
        self._n_samples = sum(len(targets) for _, data in pairs for _, targets in data)
        self._parts: list[_Part] = []
        for la, data in pairs:
            asked = copy.copy(la)
            asked._fitted = replace(la._fit, known_unchanged=True)  # `search` has compared the model
            if request.pred_type == "nn":
                self._parts.append(_Sampled(AtPrecisions(asked), la._fit.accumulated, request, data))
            else:
                view, room = View.of(asked), KEPT_BUDGET // len(pairs)
                self._parts.append(_Linearised(view, request, [_Batch(view, *batch) for batch in data], room))

    def scores(self, precisions: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        """The score at each precision."""
        scores = [self._new_score() for _ in precisions]
        total = self._n_samples * len(precisions)
        with tqdm(total=total, desc="held-out samples", disable=not self._progress_bar) as bar:
            for answered in (answered for part in self._parts for answered in part.answered(precisions)):
                to_the_same_draws = self._returns()
                for score, answers in zip(scores, answered, strict=True):
                    to_the_same_draws()
                    for found, outputs, targets in answers:
                        score.update(found, outputs, targets)
                        bar.update(len(targets))
        return torch.tensor([score.value() for score in scores], dtype=torch.float64)

    def _returns(self) -> Callable[[], object]:
        """What sets the source of randomness back to where it is now."""
        if self._generator is None:
            return partial(set_random_state, self._device, random_state(self._device))
        return partial(self._generator.set_state, self._generator.get_state())


Answered = tuple[Answer, Tensor, Tensor]
"""An answer for some samples, with their outputs and targets."""


class _Part(ABC):
    """A posterior and the data that it is scored on."""

    @abstractmethod
    def answered(self, precisions: Float[Tensor, " G"]) -> Iterator[Iterator[Iterator[Answered]]]:
        """Some samples at a time: for each precision what is answered, piece by piece, made when it is asked for."""


@dataclass(frozen=True)
class _Sampled(_Part):
    """Predictions of the network at draws of its weights.

    Attributes:
        at: the posterior at a precision.
        accumulated: what it was fitted to, whose outputs are the same at all precisions.
        request: what to predict.
        data: the batches.
    """

    at: AtPrecisions
    accumulated: Accumulated
    request: Request
    data: Sequence[tuple[Any, Tensor]]

    def answered(self, precisions: Float[Tensor, " G"]) -> Iterator[Iterator[Iterator[Answered]]]:
        """See `_Part.answered`: all samples at once, of which nothing but outputs is the same for all precisions."""
        with torch.no_grad():
            outputs = [self.accumulated.recorder(x).outputs.detach() for x, _ in self.data]
        yield (self._at(precision, outputs) for precision in precisions.tolist())

    def _at(self, precision: float, outputs: Sequence[Tensor]) -> Iterator[Answered]:
        la = self.at(precision)
        for (x, targets), f in zip(self.data, outputs, strict=True):
            yield la._predictor(self.request.pred_type)(x, self.request), f, targets


@dataclass
class _Batch:
    """Outputs and features of a batch, kept where there is room.

    Attributes:
        view: what they are computed by.
        x: the inputs.
        targets: the targets.
        kept: what was kept.
    """

    view: View
    x: Any
    targets: Tensor
    kept: list[Kept] | None = None

    def keep(self, room: int) -> int:
        """Compute what fits into `room` entries, unless it is there already: how many there are."""
        if self.kept is None:
            found, entries = [], 0
            for piece in self.view.pieces(self.x):
                found.append(piece)
                entries += piece.entries
                if entries > room:
                    return 0
            self.kept = found
        return sum(piece.entries for piece in self.kept)

    def pieces(self) -> Iterator[tuple[Kept, Tensor]]:
        """Some samples at a time, with their targets."""
        start = 0
        for piece in self.view.pieces(self.x) if self.kept is None else self.kept:
            stop = start + len(piece.outputs)
            yield piece, self.targets[start:stop]
            start = stop


@dataclass(frozen=True)
class _Linearised(_Part):
    """Predictions of the linearised network.

    Attributes:
        view: the posterior.
        request: what to predict.
        batches: the data.
        room: how many entries of their features are kept.
    """

    view: View
    request: Request
    batches: Sequence[_Batch]
    room: int

    def answered(self, precisions: Float[Tensor, " G"]) -> Iterator[Iterator[Iterator[Answered]]]:
        """See `_Part.answered`."""
        for group in self._groups():
            yield self._answers(group, precisions)

    def _groups(self) -> Iterator[list[tuple[Kept, Tensor]]]:
        """As many samples at a time as there is memory for: those without an eigenbasis share what is factored."""
        room = self.room
        group: list[tuple[Kept, Tensor]] = []
        held = 0
        for batch in self.batches:
            room -= batch.keep(room)
            for piece, targets in batch.pieces():
                group.append((piece, targets))
                held += piece.entries if batch.kept is None else 0
                if self.view.basis is not None or held > HELD_BUDGET:
                    yield group
                    group, held = [], 0
        if group:
            yield group

    def _answers(
        self, group: Sequence[tuple[Kept, Tensor]], precisions: Float[Tensor, " G"]
    ) -> Iterator[Iterator[Answered]]:
        pieces = [piece for piece, _ in group]
        responses = [self._response(piece) for piece in pieces]
        variances = not needs_covariance(responses[0], self.request)
        for spreads in self.view.spreads(pieces, precisions, variances=variances):
            yield map(self._answer, group, responses, spreads)

    def _answer(self, with_targets: tuple[Kept, Tensor], response: Response, spread: Tensor) -> Answered:
        piece, targets = with_targets
        found = answer(response, self.request, piece.outputs, spread)
        return found, piece.outputs.reshape(-1, *piece.output_shape), targets

    def _response(self, piece: Kept) -> Response:
        la = self.view.la
        return Response(la.likelihood, lambda: piece.output_shape, la.sigma_noise.detach())


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
