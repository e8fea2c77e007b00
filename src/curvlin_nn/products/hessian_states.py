"""The state of a Hessian over data in any of its structures: sums of what is kept, or leading eigenpairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvlin.precision.base import PrecisionOperator
from curvlin_nn.errors import UnsupportedError
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

    def merge(self, other: object) -> None:
        """Not possible: the eigenpairs of a sum are not those of its terms.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "hessian_structure='lowrank' of a Hessian cannot continue with other data, expected all at once; fit with "
            "override=True, or take 'full', 'block' or 'diag'"
        )

    def finish(self) -> PrecisionOperator:
        """See `Eigenpairs.operator`."""
        return self.pairs.operator(self.indefinite)


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
