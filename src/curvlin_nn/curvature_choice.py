"""Which curvature of which weights a posterior sums over the data, and what sums it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from curvlin_nn import structures
from curvlin_nn.capture.reduction import check_reduction
from curvlin_nn.columns import Columns
from curvlin_nn.curvature import Accumulated, State, accumulate
from curvlin_nn.damping import check_damping
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.feature_maps import FeatureMap
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace, Selection
from curvlin_nn.per_output import PerOutput
from curvlin_nn.products.hessian_accumulation import accumulate_hessian
from curvlin_nn.products.hessian_states import empty_state
from curvlin_nn.products.hessian_sums import check_structure
from curvlin_nn.storage import options
from curvlin_nn.storage.checkpoint import Checkpoint
from curvlin_nn.structures import FunctionSpace, StructureChoice, StructureFactory
from curvlin_nn.subnetwork_space import Subnetwork

CURVATURES = {"ggn": "exact", "fisher_mc": "mc", "ef": "empirical", "hessian": "exact"}
"""The curvatures by name, with the kind of columns that each is made of; a Hessian is made of none."""


@dataclass(frozen=True)
class CurvatureChoice(ABC):
    """What the arguments of `Laplace` say of the curvature.

    Attributes:
        name: one of `CURVATURES`.
        selection: of which weights, or in which features.
        columns: what it is made of; of a Hessian the source of randomness only.
        feature_reduction: what the model does with the outputs of its last layer at several positions.
        damping: whether it makes a Kronecker-damped posterior.
    """

    name: str
    selection: Selection | Subnetwork | FeatureMap
    columns: Columns
    feature_reduction: str | None
    damping: bool

    def accumulated(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        loader: Iterable[Any],
        n_outputs: int = 0,
        progress_bar: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> Accumulated:
        """The sums over the data, those of each of `n_outputs` outputs by themselves if that is not 0.

        Raises:
            UnsupportedError: if it has no such sums, or none that a checkpoint can hold.
        """
        return self._sums(n_outputs, checkpoint)(
            model,
            likelihood,
            loader,
            self.selection,
            columns=self.columns,
            feature_reduction=self.feature_reduction,
            progress_bar=progress_bar,
            checkpoint=checkpoint,
        )

    @abstractmethod
    def _sums(self, n_outputs: int, checkpoint: Checkpoint | None) -> Callable[..., Accumulated]:
        """What goes through the data, called as `accumulate` is but for the factories."""

    @abstractmethod
    def empty_states(self, n_outputs: int = 0) -> Sequence[Callable[[ParameterSpace], State]]:
        """What makes the states of `accumulated`, before they see anything."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The structure and what goes with it, in plain values, by the names of the arguments."""

    @property
    def in_function_space(self) -> bool:
        """Whether the posterior is over outputs, and not over weights."""
        return False


def curvature_choice(
    selection: Selection | Subnetwork | FeatureMap,
    structure: StructureChoice | None,
    curvature: str,
    *,
    indefinite: str,
    feature_reduction: str | None,
    damping: bool,
    generator: torch.Generator | None,
) -> CurvatureChoice:
    """What the arguments of `Laplace` choose; see there.

    Raises:
        UnsupportedError: for one that is not served, or not with another.
    """
    if curvature not in CURVATURES:
        raise UnsupportedError(f"curvature={curvature!r} is not supported; expected {one_of(CURVATURES)}")
    structure = "kron" if structure is None else structure
    columns = Columns(CURVATURES[curvature], generator=generator)
    reduction = check_reduction(feature_reduction)
    damping = check_damping(damping, curvature, structure)
    if curvature != "hessian":
        resolved = structures.resolve(structure)
        return OfColumns(curvature, selection, columns, reduction, damping, resolved)
    named = check_structure(structure, indefinite)
    if isinstance(selection, (Subnetwork, FeatureMap)):
        raise UnsupportedError(
            "curvature='hessian' is not supported for a subnetwork; take curvature='ggn', or whole parameters by name"
        )
    return OfHessian(curvature, selection, columns, reduction, damping, *named)


@dataclass(frozen=True)
class OfColumns(CurvatureChoice):
    """A curvature that is made of columns, in any structure.

    Attributes:
        structure: what sums it.
    """

    structure: StructureFactory

    @property
    def in_function_space(self) -> bool:
        """See `CurvatureChoice.in_function_space`."""
        return self.structure is FunctionSpace

    def _sums(self, n_outputs: int, checkpoint: Checkpoint | None) -> Callable[..., Accumulated]:
        return partial(accumulate, factories=self.empty_states(n_outputs))

    def empty_states(self, n_outputs: int = 0) -> list[StructureFactory]:
        """See `CurvatureChoice.empty_states`."""
        if n_outputs == 0:
            return [self.structure]
        if self.damping:
            raise UnsupportedError("damping=True takes one sigma_noise for all outputs; give one number")
        if self.columns.kind != "exact":
            _refuse_by_output()
        if isinstance(self.selection, Subnetwork):
            raise UnsupportedError(
                "one sigma_noise for each output is not supported for a subnetwork; give one number, or whole "
                "parameters by name"
            )
        return [partial(PerOutput, structure=self.structure, n_outputs=n_outputs)]

    def described(self) -> dict[str, Any]:
        """See `CurvatureChoice.described`."""
        return {"hessian_structure": options.of_structure(self.structure), "indefinite": "raise"}


@dataclass(frozen=True)
class OfHessian(CurvatureChoice):
    """The Hessian of the negative log-likelihood.

    Attributes:
        selection: of which weights.
        structure: ``"full"``, ``"block"``, ``"diag"`` or ``"lowrank"``.
        indefinite: what negative eigenvalues do.
    """

    selection: Selection
    structure: str
    indefinite: str

    def _sums(self, n_outputs: int, checkpoint: Checkpoint | None) -> Callable[..., Accumulated]:
        if n_outputs:
            _refuse_by_output()
        if checkpoint is not None and self.structure == "lowrank":
            raise UnsupportedError(
                "checkpoint is not supported for hessian_structure='lowrank' of a Hessian, whose passes sum nothing; "
                "leave it at None, or take 'full', 'block' or 'diag'"
            )
        return partial(accumulate_hessian, structure=self.structure, indefinite=self.indefinite)

    def empty_states(self, n_outputs: int = 0) -> list[Callable[[ParameterSpace], State]]:
        """See `CurvatureChoice.empty_states`."""
        if n_outputs:
            _refuse_by_output()
        return [partial(empty_state, structure=self.structure, indefinite=self.indefinite)]

    def described(self) -> dict[str, Any]:
        """See `CurvatureChoice.described`."""
        return {"hessian_structure": self.structure, "indefinite": self.indefinite}


def _refuse_by_output() -> NoReturn:
    raise UnsupportedError(
        "one sigma_noise for each output is served for curvature='ggn' only; give one number"
    )
