"""The curvature of a model's log-likelihood: one stream of captures through any number of structures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin.precision.base import PrecisionOperator
from curvlin_nn import likelihoods, structures
from curvlin_nn.batches import Labelled, batches, choose
from curvlin_nn.capture import Captures, Recorder, Recording
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import EXACT, Columns
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.feature_maps import FeatureMap, JacobianMap, RestrictedMap
from curvlin_nn.feature_maps.recording import FeatureRecorder, FeatureRecording
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.output_curvature import OutputCurvature
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.hessian_states import hessian_state
from curvlin_nn.products.hessian_sums import MAX_PARAMETERS, check_structure
from curvlin_nn.products.matrix_free import check_kind
from curvlin_nn.storage.checkpoint import Batch, Checkpoint
from curvlin_nn.storage.plain import with_tensors
from curvlin_nn.structures import Structure, StructureChoice, StructureFactory
from curvlin_nn.subnetwork_space import Subnetwork
from curvlin_nn.subnetwork_structure import SubnetworkStructure


class State(Protocol):
    """What is kept of data: a sum that merges with the sum over other data."""

    def check_merge(self, other: Any) -> None:
        """Whether `merge` would add `other`."""

    def merge(self, other: Any) -> None:
        """Add the sum over other data."""

    def finish(self) -> PrecisionOperator:
        """The curvature of everything seen."""

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what another state held."""


@dataclass(frozen=True)
class Accumulated:
    """What a pass over data leaves.

    Attributes:
        recorder: the verified recorder of the model, or of a feature map in its place.
        states: the state of each structure.
        statistics: what the log-likelihood needs to know of the data.
        n_data: the number of samples seen.
        output_shape: of the outputs of one sample (of the last one, where sequences vary in length).
        of_a_term: E, how many of the outputs are of one term of the log-likelihood.
        subnetwork: the chosen coordinates, if these are not whole parameters.
    """

    recorder: Recorder | FeatureRecorder
    states: tuple[State, ...]
    statistics: Float[Tensor, " K"]
    n_data: int = 0
    output_shape: tuple[int, ...] = ()
    of_a_term: int = 0
    subnetwork: Subnetwork | None = None

    @property
    def space(self) -> ParameterSpace:
        """The coordinates the curvature is about; of a subnetwork, as many of each parameter as were chosen."""
        return self.recorder.space if self.subnetwork is None else self.subnetwork.space

    def feature_map(self, differentiable: bool = False) -> FeatureMap:
        """The Jacobian in these coordinates, or what stands in for it.

        Args:
            differentiable: whether a Jacobian is to have gradients by its inputs.
        """
        if isinstance(self.recorder, FeatureRecorder):
            return self.recorder.feature_map
        jacobian = JacobianMap.of(self.recorder, differentiable=differentiable)
        return jacobian if self.subnetwork is None else RestrictedMap(jacobian, self.subnetwork.index)

    @property
    def whole_space(self) -> ParameterSpace:
        """The parameters that the coordinates are counted in: `space`, but for a subnetwork all of them."""
        return self.recorder.space if self.subnetwork is None else self.subnetwork.whole

    @property
    def n_outputs(self) -> int:
        """C, the number of outputs per sample."""
        return math.prod(self.output_shape)

    def with_batch(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor, where: str) -> Accumulated:
        """The counts and statistics with one batch more.

        Raises:
            OutputError: if the outputs have another shape than in earlier batches, but for the length of sequences.
        """
        with_it = replace(
            self,
            statistics=self.statistics + likelihood.statistics(outputs, targets),
            n_data=self.n_data + len(outputs),
            output_shape=tuple(outputs.shape[1:]),
            of_a_term=likelihood.terms(outputs).shape[-1],
        )
        if self.n_data and not self.takes(with_it.output_shape, with_it.of_a_term):
            before = ", ".join(("N", *map(str, self.output_shape)))
            raise OutputError(
                f"model outputs on {where} must have shape ({before}) as before, but for the length of sequences, "
                f"found {tuple(outputs.shape)}"
            )
        return with_it

    def merged(self, other: Accumulated) -> Accumulated:
        """The sums over this data and that of `other`, whose states stay as they are.

        Raises:
            UnsupportedError: if they are about different parameters or outputs.
        """
        same = self.space == other.space and self.subnetwork == other.subnetwork
        if not same or not self.takes(other.output_shape, other.of_a_term):
            raise UnsupportedError(
                "the two fits are about different parameters or outputs, expected the same"
            )
        for mine, theirs in zip(self.states, other.states, strict=True):
            mine.merge(theirs)
        n_data, statistics = self.n_data + other.n_data, self.statistics + other.statistics
        return replace(self, n_data=n_data, statistics=statistics)

    def check_mergeable(self) -> None:
        """Whether these sums merge with others like them, asked before passes over data are made for those.

        Raises:
            UnsupportedError: if they do not.
        """
        for state in self.states:
            state.check_merge(state)

    def state_dict(self) -> dict[str, Any]:
        """The sums as tensors and plain values; the recorder is made again."""
        return {
            "parameters": {
                "names": list(self.recorder.space.names),
                "shapes": [list(shape) for shape in self.recorder.space.shapes],
            },
            "states": [state.state_dict() for state in self.states],
            "statistics": self.statistics,
            "n_data": self.n_data,
            "output_shape": list(self.output_shape),
            "of_a_term": self.of_a_term,
        }

    @classmethod
    def of(
        cls,
        state: dict[str, Any],
        model: nn.Module,
        factories: Sequence[Callable[[ParameterSpace], Any]],
        subset: Subnetwork | FeatureMap | None = None,
        feature_reduction: str | None = None,
    ) -> Accumulated:
        """The sums that had this `state_dict`, over a model or map like theirs, in states that the factories make."""
        recorder = _recorder(model, subset, _space(state["parameters"]), feature_reduction)
        subnetwork = subset if isinstance(subset, Subnetwork) else None
        states = tuple(factory(recorder.space) for factory in _of_subnetwork(factories, subnetwork))
        return cls(recorder, states, state["statistics"], subnetwork=subnetwork).with_state(state)

    def with_state(self, state: dict[str, Any]) -> Accumulated:
        """The same recorder with the sums that had this `state_dict`, in states that have seen nothing."""
        device = device_of(self.recorder.model)
        state = with_tensors(lambda tensor: tensor.detach().to(device, copy=True), state)
        for mine, stored in zip(self.states, state["states"], strict=True):
            mine.load_state_dict(stored)
        return replace(
            self,
            statistics=state["statistics"],
            n_data=state["n_data"],
            output_shape=tuple(state["output_shape"]),
            of_a_term=state["of_a_term"],
        )

    def takes(self, output_shape: tuple[int, ...], of_a_term: int) -> bool:
        """Whether outputs may be of this shape: sequences of another length in each batch, but no other vector."""
        if self.of_a_term != of_a_term or len(self.output_shape) != len(output_shape):
            return False
        return len(self.output_shape) > 1 or self.output_shape == output_shape


@outside_inference_mode()
def curvature(
    model: nn.Module,
    likelihood: str | nn.Module | Likelihood,
    loader: Iterable[Any],
    hessian_structure: StructureChoice = "kron",
    columns: str = "exact",
    subset_of_weights: Selection | Subnetwork = "all",
    *,
    n_columns: int = 1,
    generator: torch.Generator | None = None,
    kind: str = "ggn",
    indefinite: str = "raise",
    max_parameters: int = MAX_PARAMETERS,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> PrecisionOperator:
    """The generalised Gauss-Newton matrix of the negative log-likelihood, or its Hessian, summed over the data.

    ``H = sum_n J_n^T Lambda_n J_n`` in the given structure, at ``sigma_noise = 1`` and temperature 1.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
        likelihood: a name (`likelihoods.available`), a loss of torch (`likelihoods.from_loss`) or a `Likelihood`.
        loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`.
        hessian_structure: a name (`structures.available`: ``"full"``, ``"kron"``, ``"diag"``, ``"ekfac"``, ``"kfoc"``,
            ``"kron-lowrank"``, ``"block"``, ``"lowrank"``), a `Structure` class, or one of these for each ``fnmatch``
            pattern of names of parameters or modules; of a Hessian, ``"full"``, ``"block"`` (one for each parameter
            tensor), ``"diag"`` or ``"lowrank"`` (the 100 leading eigenpairs of either sign; `hessian_eigenpairs` takes
            any number).
        columns: ``"exact"``; ``"mc"`` or ``"sketch"``, which are unbiased; ``"empirical"`` for the empirical Fisher
            matrix instead.
        subset_of_weights: ``"all"``, ``"last_layer"``, names of parameters or modules, a predicate, or a `Subnetwork`.
        n_columns: how many for ``"mc"`` and ``"sketch"``, for each sample.
        generator: source of randomness for these; None is torch's default generator.
        kind: ``"ggn"``; or ``"hessian"``, exact, by P products of two backward passes for each batch
            (``"lowrank"``: by 450, whatever P is).
        indefinite: what a Hessian with negative eigenvalues (of each block, entries of a diagonal) does: ``"raise"``;
            ``"clip"`` sets them to zero; ``"abs"`` takes absolute values.
        max_parameters: P at most for a Hessian, but for ``"lowrank"``.
        dict_key_y: the name of the targets in loaders that yield mappings.
        progress_bar: whether to show one.

    Returns:
        An operator in the flat order of `torch.nn.utils.parameters_to_vector` over the chosen parameters, summed
        in float64 and returned in their dtype.

    Raises:
        UnsupportedError: for a model or option that is not served.
        DataError: for a batch that cannot be used.
        OutputError: for outputs of the wrong shape, or not finite.
        IndefiniteHessianError: for a Hessian with a negative eigenvalue, if that is to raise.
    """
    check_kind(kind, columns)
    loader = Labelled(loader, dict_key_y)
    if kind == "hessian":
        structure, indefinite = check_structure(hessian_structure, indefinite)
        if isinstance(subset_of_weights, Subnetwork):
            raise UnsupportedError("kind='hessian' is not supported for a subnetwork; take kind='ggn'")
        H = Hessian(model, likelihoods.resolve(likelihood), loader, subset_of_weights, progress_bar)
        with random_state_kept(device_of(model)):  # loaders draw from the default generator
            total = hessian_state(H, structure, indefinite, max_parameters, generator)
        return total.finish().to(H.space.dtype(model))
    factory = structures.resolve(hessian_structure)
    accumulated = accumulate(
        model,
        likelihoods.resolve(likelihood),
        loader,
        subset_of_weights,
        [factory],
        columns=Columns(columns, n_columns, generator),
        progress_bar=progress_bar,
    )
    return accumulated.states[0].finish().to(accumulated.space.dtype(model))


def accumulate(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any],
    subset_of_weights: Selection | Subnetwork | FeatureMap,
    factories: Sequence[StructureFactory],
    *,
    columns: Columns = EXACT,
    feature_reduction: str | None = None,
    progress_bar: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Accumulated:
    """Send captures of all data through structures; several share the passes. See `curvature`.

    A feature map in the place of the subset of weights has its coordinates in the place of parameters.

    With a checkpoint, sums that it holds are continued, and batches that are in them are only looked at.
    """
    sums = Accumulation(model, likelihood, subset_of_weights, factories, columns, feature_reduction)
    return run_passes(sums, loader, progress_bar, checkpoint)


def run_passes(
    sums: Accumulation,
    loader: Iterable[Any],
    progress_bar: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Accumulated:
    """Send the loader through sums in the making as often as these need; see `accumulate`."""
    device = device_of(sums.model)
    with random_state_kept(device):  # loaders draw from the default generator
        if checkpoint is not None:
            checkpoint.resume(sums)
        pass_index = 0
        while pass_index < sums.passes:
            sums.begin(pass_index)
            stream: Iterable[Batch] = enumerate(batches(loader, device, progress_bar))
            for index, (x, targets) in (
                stream if checkpoint is None else checkpoint.unseen(stream, pass_index, sums)
            ):
                sums.add(x, targets, f"batch {index}")
            sums.end(pass_index)
            pass_index += 1
    return sums.found


class Accumulation:
    """Sums in the making: how far a pass over the data has come, and what has been added until then.

    Args:
        model: as in `accumulate`.
        likelihood: likewise.
        subset_of_weights: likewise.
        factories: likewise.
        columns: likewise.
        feature_reduction: likewise.

    Attributes:
        model: as given.
        columns: as given.
        pass_index: the pass that is under way, counted from zero.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        subset_of_weights: Selection | Subnetwork | FeatureMap,
        factories: Sequence[StructureFactory],
        columns: Columns,
        feature_reduction: str | None = None,
    ) -> None:
        self.model, self.columns, self.pass_index = model, columns, -1
        self._likelihood, self._subset, self._factories = likelihood, subset_of_weights, factories
        self._feature_reduction = feature_reduction
        self._sums: Accumulated | None = None
        self._states: tuple[Structure, ...] = ()
        self._n_data = 0  # in this pass

    @property
    def passes(self) -> int:
        """How many are needed, as far as is known."""
        return max((state.passes for state in self._states), default=1)

    @property
    def found(self) -> Accumulated:
        """The sums.

        Raises:
            DataError: if there was no batch.
        """
        if self._sums is None:
            raise DataError("the loader yielded no batch, expected at least one (inputs, targets)")
        return self._sums

    def begin(self, pass_index: int) -> None:
        """Called before each pass; one that is behind already does not begin again."""
        if pass_index > self.pass_index:
            self.pass_index, self._n_data = pass_index, 0
            for state in self._unfinished():
                state.begin(pass_index)

    def add(self, x: Any, targets: Tensor, where: str) -> None:
        """One batch."""
        if self._sums is None:
            if isinstance(self._subset, Subnetwork):
                self._start(self._subset.touched)
            else:
                self._start(choose(self.model, self._subset, x, where))
        recording = self.found.recorder(x, where)
        targets = self._likelihood.check(recording.outputs, targets, where)
        if self.pass_index == 0:
            self._sums = self.found.with_batch(self._likelihood, recording.outputs, targets, where)
        self._n_data += len(recording.outputs)
        if unfinished := self._unfinished():
            # Later passes are about rows, not about their sums.
            closed = self.pass_index == 0 and all(state.takes_output_curvature for state in unfinished)
            for captures in _captures(recording, self._likelihood, targets, self.columns, closed=closed):
                for state in unfinished:
                    state.update(captures)

    def end(self, pass_index: int) -> None:
        """Called after each pass; one that is behind already does not end again.

        Raises:
            DataError: if it saw another number of samples than the first.
        """
        if pass_index == self.pass_index and self._n_data != self.found.n_data:
            raise DataError(
                f"pass {pass_index} over the loader yielded {self._n_data} samples, expected "
                f"{self.found.n_data} as in the first; give a loader that can be iterated several times"
            )

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values, after a batch of any pass."""
        return {"pass": self.pass_index, "n_data": self._n_data, "sums": self.found.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        self.pass_index, self._n_data = state["pass"], state["n_data"]
        self._start(_space(state["sums"]["parameters"]))
        self._sums = self.found.with_state(state["sums"])

    def _start(self, space: ParameterSpace) -> None:
        subnetwork = self._subset if isinstance(self._subset, Subnetwork) else None
        self._states = tuple(factory(space) for factory in _of_subnetwork(self._factories, subnetwork))
        for state in self._states:
            state.begin(0)
        recorder = _recorder(self.model, self._subset, space, self._feature_reduction)
        nothing = torch.zeros(1, dtype=torch.float64, device=device_of(self.model))
        self._sums = Accumulated(recorder, self._states, nothing, subnetwork=subnetwork)

    def _unfinished(self) -> list[Structure]:
        return [state for state in self._states if self.pass_index < state.passes]


def _captures(
    recording: Recording | FeatureRecording,
    likelihood: Likelihood,
    targets: Tensor,
    columns: Columns,
    *,
    closed: bool = False,
) -> Iterator[Captures]:
    """What a batch says, some columns at a time; or in closed form if that is wanted, and the parameters allow it."""
    outputs = recording.outputs
    terms = likelihood.terms(outputs)
    weights = likelihood.weights(terms, targets)
    kept = None if weights is None else weights != 0
    if closed and columns.kind == "exact" and recording.ends_in(terms):
        # The layer's output is the term: its curvature needs no columns.
        none = recording.captures(outputs.new_zeros(0, *outputs.shape))
        yield replace(none, kept=kept, output_curvature=OutputCurvature(likelihood, terms, targets, weights))
        return
    for index, some in enumerate(columns(likelihood, outputs, targets)):
        for captures in recording.streamed(some, first=index == 0):
            yield replace(captures, kept=kept)


def _of_subnetwork(
    factories: Sequence[Callable[[ParameterSpace], Any]], subnetwork: Subnetwork | None
) -> Sequence[Callable[[ParameterSpace], Any]]:
    """What makes states over the parameters that a subnetwork touches."""
    if subnetwork is None:
        return factories
    return [partial(SubnetworkStructure, subnetwork=subnetwork, factory=factory) for factory in factories]


def _recorder(
    model: nn.Module,
    subset: Selection | Subnetwork | FeatureMap | None,
    space: ParameterSpace,
    feature_reduction: str | None,
) -> Recorder | FeatureRecorder:
    if isinstance(subset, FeatureMap):
        return FeatureRecorder(model, subset, space)
    return Recorder(model, space, feature_reduction=feature_reduction)


def _space(state: dict[str, Any]) -> ParameterSpace:
    return ParameterSpace(tuple(state["names"]), tuple(torch.Size(shape) for shape in state["shapes"]))
