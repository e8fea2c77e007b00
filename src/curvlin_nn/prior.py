"""The Gaussian prior: a mean, and precisions shared by groups of coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin import BlockDiag, Diagonal, Isotropic, KroneckerSum, Woodbury
from curvlin.precision.base import PrecisionOperator
from curvlin_nn._check import numbers
from curvlin_nn.errors import UnsupportedError, one_of
from curvlin_nn.parameters import ParameterSpace

GROUPINGS: dict[str, Callable[[ParameterSpace], list[tuple[str, ...]]]] = {
    "scalar": lambda space: [space.names],
    "layerwise": lambda space: [(name,) for name in space.names],
    "modulewise": lambda space: list(space.modules.values()),
}
"""Which parameters share a precision: all, each tensor alone, or those of a module (its weight and bias)."""

STRUCTURES = (*GROUPINGS, "diag")
"""The names of prior structures; ``"diag"`` is one precision per coordinate."""


def check_structure(prior_structure: str) -> None:
    """Whether a prior structure has that name.

    Raises:
        UnsupportedError: if none has.
    """
    if prior_structure not in STRUCTURES:
        raise UnsupportedError(
            f"prior_structure={prior_structure!r} is not supported; expected {one_of(STRUCTURES)}"
        )


def group_of_coordinate(space: ParameterSpace, prior_structure: str) -> Int[Tensor, " P"]:
    """The index of the group that each coordinate belongs to.

    Raises:
        UnsupportedError: if no prior structure has that name.
    """
    if prior_structure == "diag":
        return torch.arange(space.size)
    check_structure(prior_structure)
    groups = torch.empty(space.size, dtype=torch.long)
    for index, names in enumerate(GROUPINGS[prior_structure](space)):
        for name in names:
            span = space.spans[name]
            groups[span.start : span.stop] = index
    return groups


def label_of_group(space: ParameterSpace, prior_structure: str) -> Callable[[int], str]:
    """What to call a group in messages."""
    if prior_structure in ("scalar", "diag"):
        return lambda k: "the parameter vector" if prior_structure == "scalar" else f"coordinate {k}"
    groups = GROUPINGS[prior_structure](space)
    return lambda k: f"parameter {' with '.join(map(repr, groups[k]))}"


def infer_structure(space: ParameterSpace, precision: Float[Tensor, "*K"], wanted: str | None = None) -> str:
    """The prior structure that fits the number of precisions.

    Args:
        space: the parameters.
        precision: one entry per group.
        wanted: the structure to take where it fits; needed where several fit.

    Raises:
        ValueError: if none fits, or several that mean different things.
    """
    if precision.numel() == 1:
        return "scalar"
    fitting: dict[str, Tensor] = {}
    for name in STRUCTURES:
        groups = group_of_coordinate(space, name)
        if int(groups.max()) + 1 == precision.numel() and not any(
            torch.equal(groups, g) for g in fitting.values()
        ):
            fitting[name] = groups
    if not fitting:
        raise ValueError(
            f"prior_precision must have 1, {len(space.names)} (per parameter tensor), {len(space.modules)} "
            f"(per module) or {space.size} (per parameter) entries, found {precision.numel()}"
        )
    if wanted in fitting:
        return wanted
    if len(fitting) > 1:
        raise ValueError(
            f"prior_precision with {precision.numel()} entries fits several structures, "
            f"{' and '.join(fitting)}; say which with prior_structure="
        )
    return next(iter(fitting))


def check_precision(value: float | Tensor) -> Tensor:
    """Prior precisions as a tensor of at most one dimension.

    Raises:
        TypeError: if they are no numbers.
        ValueError: if they are not positive and finite.
    """
    precision = numbers("prior_precision", value)
    if not precision.is_floating_point() or precision.ndim > 1 or precision.numel() == 0:
        raise ValueError(
            "prior_precision must be a number or a one-dimensional floating tensor, found shape "
            f"{tuple(precision.shape)} of {precision.dtype}"
        )
    refused = precision[~((precision > 0) & torch.isfinite(precision))]
    if len(refused):
        raise ValueError(f"prior_precision must be positive and finite, found {float(refused[0]):.3e}")
    return precision


class Prior(ABC):
    """A Gaussian prior seen from the parameters that the posterior is fitted around.

    Attributes:
        deviation: ``theta_MAP - mean``, float64.
    """

    deviation: Float[Tensor, " P"]

    @abstractmethod
    def logdet(self) -> Float[Tensor, ""]:
        """``log det P0``, float64."""

    @abstractmethod
    def scatter(self) -> Float[Tensor, ""]:
        """``(theta - mean)^T P0 (theta - mean)``, float64."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " P"]:
        """That of P0, float64."""

    @abstractmethod
    def operator(self, H: PrecisionOperator) -> PrecisionOperator:
        """The precision P0, in the form whose sum with the curvature H is closed where one exists."""


@dataclass(frozen=True)
class OperatorPrior(Prior):
    """A prior whose precision is any operator, such as an earlier posterior's.

    Attributes:
        precision: P0.
        deviation: ``theta_MAP - mean``, float64.
    """

    precision: PrecisionOperator
    deviation: Float[Tensor, " P"]

    def logdet(self) -> Float[Tensor, ""]:
        """See `Prior.logdet`."""
        return self.precision.to(torch.float64).logdet()

    def scatter(self) -> Float[Tensor, ""]:
        """See `Prior.scatter`."""
        return self.deviation @ (self.precision.to(torch.float64) @ self.deviation)

    def diagonal(self) -> Float[Tensor, " P"]:
        """See `Prior.diagonal`."""
        return self.precision.to(torch.float64).diagonal()

    def operator(self, H: PrecisionOperator) -> PrecisionOperator:
        """See `Prior.operator`."""
        return self.precision.to(H.dtype)


@dataclass(frozen=True)
class GroupedPrior(Prior):
    """``N(mean, diag(precision[groups])^-1)``.

    Attributes:
        precision: one precision per group, float64.
        groups: the group of each coordinate.
        deviation: ``theta_MAP - mean``, float64.
        label: what to call a group in messages.
    """

    precision: Float[Tensor, " K"]
    groups: Int[Tensor, " P"]
    deviation: Float[Tensor, " P"]
    label: Callable[[int], str]

    @classmethod
    def of(
        cls,
        space: ParameterSpace,
        structure: str,
        precision: Float[Tensor, " K"],
        deviation: Float[Tensor, " P"],
    ) -> GroupedPrior:
        """The groups of a prior structure, on the device of the deviation."""
        groups = group_of_coordinate(space, structure).to(deviation.device)
        precision = precision.to(deviation.device).double()
        return cls(precision, groups, deviation, label_of_group(space, structure))

    def regrouped(self, space: ParameterSpace, structure: str) -> GroupedPrior:
        """Over the groups of another structure, with the precisions averaged geometrically."""
        groups = group_of_coordinate(space, structure).to(self.groups.device)
        n_groups, precision = int(groups.max()) + 1, self.precision.detach()
        if len(precision) == 1:
            precision = precision.expand(n_groups)
        else:
            logs = precision.log()[self.groups]
            total = logs.new_zeros(n_groups).index_add(0, groups, logs)
            precision = (total / torch.bincount(groups, minlength=n_groups)).exp()
        return GroupedPrior(precision, groups, self.deviation, label_of_group(space, structure))

    def logdet(self) -> Float[Tensor, ""]:
        """See `Prior.logdet`."""
        return (self.sizes * self.precision.log()).sum()

    def scatter(self) -> Float[Tensor, ""]:
        """See `Prior.scatter`."""
        return (self.squares * self.precision).sum()

    def diagonal(self) -> Float[Tensor, " P"]:
        """See `Prior.diagonal`."""
        return self.precision[self.groups]

    @property
    def sizes(self) -> Float[Tensor, " K"]:
        """The number of coordinates in each group."""
        return torch.bincount(self.groups, minlength=len(self.precision)).double()

    @property
    def squares(self) -> Float[Tensor, " K"]:
        """The summed squared deviation in each group."""
        squares = self.deviation.square()
        if len(self.precision) == 1:
            return squares.sum().reshape(1)
        return torch.zeros_like(self.precision).index_add(0, self.groups, squares)

    @property
    def by_coordinate(self) -> Float[Tensor, " P"]:
        """The precision of each coordinate, or one for all."""
        return self.precision if len(self.precision) == 1 else self.precision[self.groups]

    def operator(self, H: PrecisionOperator) -> PrecisionOperator:
        """See `Prior.operator`."""
        if isinstance(H, Woodbury):  # what is added to is the base
            return self.operator(H.base)
        precision = self.precision.to(H.dtype)
        if len(precision) == 1:
            return Isotropic(precision[0], H.size)
        if isinstance(H, BlockDiag):
            groups = H.indices.split(self.groups, dim=0)
            blocks = [_on_block(precision, g, block) for g, block in zip(groups, H.blocks, strict=True)]
            return BlockDiag(blocks, H.indices)
        return Diagonal(precision[self.groups])


def _on_block(
    precision: Float[Tensor, " K"], groups: Int[Tensor, " size"], H: PrecisionOperator
) -> PrecisionOperator:
    """The precision of the coordinates of one block of H."""
    if bool((groups == groups[0]).all()):
        return Isotropic(precision[groups[0]], len(groups))
    if isinstance(H, KroneckerSum):
        matrix = groups.view(H.sizes)
        if bool((matrix == matrix[0]).all()):  # weight and bias as one matrix: I (x) D adds to a product
            return KroneckerSum([(None, precision[matrix[0]].diag())], sizes=H.sizes)
    return Diagonal(precision[groups])
