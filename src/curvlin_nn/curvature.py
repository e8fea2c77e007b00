"""The curvature of a model's log-likelihood: one stream of captures through any number of structures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlin.precision.base import PrecisionOperator
from curvlin_nn import likelihoods, structures
from curvlin_nn.batches import batches, choose
from curvlin_nn.capture import Captures, Recorder, Recording
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import EXACT, Columns
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.hessian_sums import MAX_PARAMETERS, HessianSum, check_structure
from curvlin_nn.products.matrix_free import check_kind
from curvlin_nn.structures import Structure, StructureChoice, StructureFactory


class State(Protocol):
    """What is kept of data: a sum that merges with the sum over other data."""

    def merge(self, other: Any) -> None:
        """Add the sum over other data."""

    def finish(self) -> PrecisionOperator:
        """The curvature of everything seen."""


@dataclass(frozen=True)
class Accumulated:
    """What a pass over data leaves.

    Attributes:
        recorder: the verified recorder of the model.
        states: the state of each structure.
        statistics: what the log-likelihood needs to know of the data.
        n_data: the number of samples seen.
        output_shape: of the outputs of one sample (of the last one, where sequences vary in length).
        of_a_term: E, how many of the outputs are of one term of the log-likelihood.
    """

    recorder: Recorder
    states: tuple[State, ...]
    statistics: Float[Tensor, " K"]
    n_data: int = 0
    output_shape: tuple[int, ...] = ()
    of_a_term: int = 0

    @property
    def space(self) -> ParameterSpace:
        """The parameters the curvature is about."""
        return self.recorder.space

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
        if self.n_data and not self._is_about_outputs_of(with_it):
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
        if self.space != other.space or not self._is_about_outputs_of(other):
            raise UnsupportedError(
                "the two fits are about different parameters or outputs, expected the same"
            )
        for mine, theirs in zip(self.states, other.states, strict=True):
            mine.merge(theirs)
        n_data, statistics = self.n_data + other.n_data, self.statistics + other.statistics
        return replace(self, n_data=n_data, statistics=statistics)

    def _is_about_outputs_of(self, other: Accumulated) -> bool:
        """Sequences may be of another length in each batch; a vector of outputs may not."""
        if self.of_a_term != other.of_a_term or len(self.output_shape) != len(other.output_shape):
            return False
        return len(self.output_shape) > 1 or self.output_shape == other.output_shape


@outside_inference_mode()
def curvature(
    model: nn.Module,
    likelihood: str | nn.Module | Likelihood,
    loader: Iterable[Any],
    hessian_structure: StructureChoice = "kron",
    columns: str = "exact",
    subset_of_weights: Selection = "all",
    *,
    n_columns: int = 1,
    generator: torch.Generator | None = None,
    kind: str = "ggn",
    indefinite: str = "raise",
    max_parameters: int = MAX_PARAMETERS,
    progress_bar: bool = False,
) -> PrecisionOperator:
    """The generalised Gauss-Newton matrix of the negative log-likelihood, or its Hessian, summed over the data.

    ``H = sum_n J_n^T Lambda_n J_n`` in the given structure, at ``sigma_noise = 1`` and temperature 1.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
        likelihood: a name (`likelihoods.available`), a loss of torch (`likelihoods.from_loss`) or a `Likelihood`.
        loader: batches ``(inputs, targets)``.
        hessian_structure: a name (`structures.available`: ``"full"``, ``"kron"``, ``"diag"``, ``"ekfac"``, ``"kfoc"``,
            ``"kron-lowrank"``, ``"block"``, ``"lowrank"``), a `Structure` class, or one of these for each ``fnmatch``
            pattern of names of parameters or modules; of a Hessian, ``"full"``, ``"block"`` (one for each parameter
            tensor) or ``"diag"``.
        columns: ``"exact"``; ``"mc"`` or ``"sketch"``, which are unbiased; ``"empirical"`` for the empirical Fisher
            matrix instead.
        subset_of_weights: ``"all"``, ``"last_layer"``, names of parameters or modules, or a predicate.
        n_columns: how many for ``"mc"`` and ``"sketch"``, for each sample.
        generator: source of randomness for these; None is torch's default generator.
        kind: ``"ggn"``; or ``"hessian"``, exact, by P products of two backward passes for each batch.
        indefinite: what a Hessian with negative eigenvalues (of each block, entries of a diagonal) does: ``"raise"``;
            ``"clip"`` sets them to zero; ``"abs"`` takes absolute values.
        max_parameters: P at most for a Hessian.
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
    if kind == "hessian":
        structure, indefinite = check_structure(hessian_structure, indefinite)
        H = Hessian(model, likelihoods.resolve(likelihood), loader, subset_of_weights, progress_bar)
        with random_state_kept(device_of(model)):  # loaders draw from the default generator
            total = HessianSum.of(H, structure, indefinite, max_parameters)
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
    subset_of_weights: Selection,
    factories: Sequence[StructureFactory],
    *,
    columns: Columns = EXACT,
    progress_bar: bool = False,
) -> Accumulated:
    """Send captures of all data through structures; several share the passes. See `curvature`."""
    device = device_of(model)
    with random_state_kept(device):  # loaders draw from the default generator
        accumulated, states = _first_pass(
            model, likelihood, batches(loader, device, progress_bar), subset_of_weights, factories, columns
        )
        for pass_index in range(1, max((state.passes for state in states), default=1)):
            unfinished = [state for state in states if pass_index < state.passes]
            for state in unfinished:
                state.begin(pass_index)
            n_data = 0
            for index, (x, targets) in enumerate(batches(loader, device, progress_bar)):
                where = f"batch {index}"
                recording = accumulated.recorder(x, where)
                targets = likelihood.check(recording.outputs, targets, where)
                n_data += len(targets)
                for captures in _captures(recording, likelihood, targets, columns):
                    for state in unfinished:
                        state.update(captures)
            if n_data != accumulated.n_data:
                raise DataError(
                    f"pass {pass_index} over the loader yielded {n_data} samples, expected "
                    f"{accumulated.n_data} as in the first; give a loader that can be iterated several times"
                )
    return accumulated


def _first_pass(
    model: nn.Module,
    likelihood: Likelihood,
    stream: Iterator[tuple[Any, Tensor]],
    subset_of_weights: Selection,
    factories: Sequence[StructureFactory],
    columns: Columns,
) -> tuple[Accumulated, tuple[Structure, ...]]:
    accumulated: Accumulated | None = None
    states: tuple[Structure, ...] = ()
    for index, (x, targets) in enumerate(stream):
        where = f"batch {index}"
        if accumulated is None:
            recorder = Recorder(model, choose(model, subset_of_weights, x, where))
            states = _started(recorder.space, factories)
            nothing = torch.zeros(1, dtype=torch.float64, device=device_of(model))
            accumulated = Accumulated(recorder, states, nothing)
        recording = accumulated.recorder(x, where)
        targets = likelihood.check(recording.outputs, targets, where)
        accumulated = accumulated.with_batch(likelihood, recording.outputs, targets, where)
        if states:
            for captures in _captures(recording, likelihood, targets, columns):
                for state in states:
                    state.update(captures)
    if accumulated is None:
        raise DataError("the loader yielded no batch, expected at least one (inputs, targets)")
    return accumulated, states


def _captures(
    recording: Recording, likelihood: Likelihood, targets: Tensor, columns: Columns
) -> Iterator[Captures]:
    """What a batch says, some columns at a time."""
    outputs = recording.outputs
    weights = likelihood.weights(likelihood.terms(outputs), targets)
    kept = None if weights is None else weights != 0
    for index, some in enumerate(columns(likelihood, outputs, targets)):
        for captures in recording.streamed(some, first=index == 0):
            yield replace(captures, kept=kept)


def _started(space: ParameterSpace, factories: Sequence[StructureFactory]) -> tuple[Structure, ...]:
    states = tuple(factory(space) for factory in factories)
    for state in states:
        state.begin(0)
    return states
