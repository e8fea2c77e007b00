"""The state of a Hessian over data in any of its structures: sums of what is kept, or leading eigenpairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from curvlin.iterative.results import Estimate, exactly
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.products.eigenpairs import Eigenpairs, leading_eigenpairs
from curvlin_nn.products.hessian import Hessian
from curvlin_nn.products.hessian_sums import MAX_PARAMETERS, HessianSum

RANK = 100
"""The eigenpairs that are kept in ``"lowrank"``; `hessian_eigenpairs` takes any number."""


@dataclass
class LowRankHessian:
    """The leading eigenpairs of the Hessian of all data that it was given.

    Attributes:
        pairs: the eigenpairs.
        indefinite: what negative ones do; see `Eigenpairs.operator`.
    """

    pairs: Eigenpairs
    indefinite: str

    def check_merge(self, other: object) -> None:
        """Not possible: the eigenpairs of a sum are not those of its terms.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "hessian_structure='lowrank' of a Hessian cannot continue with other data, expected all at once; fit with "
            "override=True, or take 'full', 'block' or 'diag'"
        )

    def merge(self, other: object) -> None:
        """See `check_merge`."""
        self.check_merge(other)

    def finish(self) -> PrecisionOperator:
        """See `Eigenpairs.operator`."""
        return self.pairs.operator(self.indefinite)

    def state_dict(self) -> dict[str, Any]:
        """The eigenpairs, as tensors and plain values."""
        pairs = self.pairs
        return {
            "values": pairs.values,
            "vectors": pairs.vectors.contiguous(),
            "residual": dict(vars(pairs.residual)),
            "resolution": pairs.resolution,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold the eigenpairs that another one held."""
        residual = Estimate(**state["residual"])
        self.pairs = Eigenpairs(state["values"], state["vectors"], residual, state["resolution"])


def empty_state(space: ParameterSpace, structure: str, indefinite: str) -> HessianSum | LowRankHessian:
    """A state that has seen nothing, to hold what another one held."""
    if structure != "lowrank":
        return HessianSum.empty(space, structure, indefinite)
    nothing = torch.empty(0, dtype=torch.float64)
    pairs = Eigenpairs(nothing, nothing.reshape(0, 0), exactly(nothing.sum(), 0), 0.0)
    return LowRankHessian(pairs, indefinite)


def hessian_state(
    H: Hessian,
    structure: str,
    indefinite: str,
    max_parameters: int = MAX_PARAMETERS,
    generator: torch.Generator | None = None,
) -> HessianSum | LowRankHessian:
    """The Hessian of the data in a structure.

    Args:
        H: the Hessian.
        structure: ``"full"``, ``"block"``, ``"diag"`` or ``"lowrank"``.
        indefinite: what negative eigenvalues do: ``"raise"``, ``"clip"`` or ``"abs"``.
        max_parameters: P at most, but for ``"lowrank"``.
        generator: source of randomness for ``"lowrank"``; None is torch's default generator.

    Raises:
        UnsupportedError: for more than `max_parameters` parameters.
        DataError, OutputError, CouplingError: as `Hessian` raises them.
    """
    if structure != "lowrank":
        return HessianSum.of(H, structure, indefinite, max_parameters)
    H.check()
    return LowRankHessian(leading_eigenpairs(H, RANK, generator=generator), indefinite)
