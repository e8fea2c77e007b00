"""The curvature of a model's log-likelihood: one stream of captures through any number of structures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from curvlin.precision.base import PrecisionOperator
from curvlin_nn import likelihoods, structures
from curvlin_nn.capture import Captures, Recorder, Recording, last_layer
from curvlin_nn.capture.inputs import split_batch
from curvlin_nn.capture.state import device_of, random_state_kept
from curvlin_nn.columns import EXACT, Columns
from curvlin_nn.errors import DataError, OutputError, UnsupportedError
from curvlin_nn.inference_mode import outside_inference_mode
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.structures import Structure, StructureChoice, StructureFactory


@dataclass(frozen=True)
class Accumulated:
    """What a pass over data leaves.

    Attributes:
        recorder: the verified recorder of the model.
        states: the state of each structure.
        n_data: the number of samples seen.
        n_outputs: C, the number of outputs per sample.
        statistics: what the log-likelihood needs to know of the data.
        output_shape: of the last sample's outputs, which C is the number of.
    """

    recorder: Recorder
    states: tuple[Structure, ...]
    n_data: int
    n_outputs: int
    statistics: Float[Tensor, " K"]
    output_shape: tuple[int, ...] = ()

    @property
    def space(self) -> ParameterSpace:
        """The parameters the curvature is about."""
        return self.recorder.space

    def with_batch(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor, where: str) -> Accumulated:
        """The counts and statistics with one batch more.

        Raises:
            OutputError: if the number of outputs is not that of earlier batches.
        """
        n_samples, n_outputs = len(outputs), outputs.shape[1:].numel()
        if self.n_outputs not in (0, n_outputs):
            raise OutputError(
                f"model outputs on {where} must have {self.n_outputs} columns as before, found {n_outputs}"
            )
        statistics = self.statistics + likelihood.statistics(outputs, targets)
        return replace(
            self,
            n_data=self.n_data + n_samples,
            n_outputs=n_outputs,
            statistics=statistics,
            output_shape=outputs.shape[1:],
        )

    def merged(self, other: Accumulated) -> Accumulated:
        """The sums over this data and that of `other`, whose states stay as they are.

        Raises:
            UnsupportedError: if they are about different parameters or outputs.
        """
        if (self.space, self.n_outputs) != (other.space, other.n_outputs):
            raise UnsupportedError(
                "the two fits are about different parameters or outputs, expected the same"
            )
        for mine, theirs in zip(self.states, other.states, strict=True):
            mine.merge(theirs)
        n_data, statistics = self.n_data + other.n_data, self.statistics + other.statistics
        return replace(self, n_data=n_data, statistics=statistics)


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
    progress_bar: bool = False,
) -> PrecisionOperator:
    """The generalised Gauss-Newton matrix of the negative log-likelihood, summed over the data.

    ``H = sum_n J_n^T Lambda_n J_n`` in the given structure, at ``sigma_noise = 1`` and temperature 1.

    Args:
        model: maps one argument to outputs ``(N, C)``; it comes back as it was.
        likelihood: a name (`likelihoods.available`), a loss of torch (`likelihoods.from_loss`) or a `Likelihood`.
        loader: batches ``(inputs, targets)``.
        hessian_structure: ``"full"``, ``"kron"``, ``"diag"``, ``"ekfac"``, ``"block"``, a `Structure` class,
            or one of these for each ``fnmatch`` pattern of names of parameters or modules.
        columns: ``"exact"``; ``"mc"`` or ``"sketch"``, which are unbiased; ``"empirical"`` for the empirical Fisher
            matrix instead.
        subset_of_weights: ``"all"``, ``"last_layer"``, names of parameters or modules, or a predicate.
        n_columns: how many for ``"mc"`` and ``"sketch"``, for each sample.
        generator: source of randomness for these; None is torch's default generator.
        progress_bar: whether to show one.

    Returns:
        An operator in the flat order of `torch.nn.utils.parameters_to_vector` over the chosen parameters, summed
        in float64 and returned in their dtype.

    Raises:
        UnsupportedError: for a model or option that is not served.
        DataError: for a batch that cannot be used.
        OutputError: for outputs of the wrong shape, or not finite.
    """
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
    dtype = next(iter(accumulated.space.tensors(model).values())).dtype
    return accumulated.states[0].finish().to(dtype)


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
        accumulated = _first_pass(
            model, likelihood, _batches(loader, device, progress_bar), subset_of_weights, factories, columns
        )
        for pass_index in range(1, max(state.passes for state in accumulated.states)):
            unfinished = [state for state in accumulated.states if pass_index < state.passes]
            for state in unfinished:
                state.begin(pass_index)
            n_data = 0
            for index, (x, targets) in enumerate(_batches(loader, device, progress_bar)):
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
    batches: Iterator[tuple[Any, Tensor]],
    subset_of_weights: Selection,
    factories: Sequence[StructureFactory],
    columns: Columns,
) -> Accumulated:
    accumulated: Accumulated | None = None
    for index, (x, targets) in enumerate(batches):
        where = f"batch {index}"
        if accumulated is None:
            accumulated = _started(Recorder(model, choose(model, subset_of_weights, x, where)), factories)
        recording = accumulated.recorder(x, where)
        targets = likelihood.check(recording.outputs, targets, where)
        accumulated = accumulated.with_batch(likelihood, recording.outputs, targets, where)
        for captures in _captures(recording, likelihood, targets, columns):
            for state in accumulated.states:
                state.update(captures)
    if accumulated is None:
        raise DataError("the loader yielded no batch, expected at least one (inputs, targets)")
    return accumulated


def _captures(
    recording: Recording, likelihood: Likelihood, targets: Tensor, columns: Columns
) -> Iterator[Captures]:
    """What a batch says, some columns at a time."""
    outputs = recording.outputs
    weights = likelihood.weights(likelihood.terms(outputs), targets)
    kept = None if weights is None else weights != 0
    for index, some in enumerate(columns(likelihood, outputs, targets)):
        yield replace(recording.captures(some, first=index == 0), kept=kept)


def _started(recorder: Recorder, factories: Sequence[StructureFactory]) -> Accumulated:
    states = tuple(factory(recorder.space) for factory in factories)
    for state in states:
        state.begin(0)
    nothing = torch.zeros(1, dtype=torch.float64, device=device_of(recorder.model))
    return Accumulated(recorder, states, n_data=0, n_outputs=0, statistics=nothing)


def choose(model: nn.Module, subset_of_weights: Selection, x: Any, where: str) -> ParameterSpace:
    """The parameters that `subset_of_weights` names; the last layer is found by running the model on `x`."""
    if isinstance(subset_of_weights, str) and subset_of_weights == "last_layer":
        return last_layer(model, x, where)
    return ParameterSpace.of(model, subset_of_weights)


def _batches(loader: Iterable[Any], device: torch.device, progress_bar: bool) -> Iterator[tuple[Any, Tensor]]:
    for index, batch in enumerate(tqdm(loader, desc="curvature", disable=not progress_bar)):
        x, targets = split_batch(batch, f"batch {index}")
        yield x, targets.to(device)
