"""Low rank: the leading eigenvectors of the whole matrix, all parameters together; never P x P.

Block subspace iteration with a Nystrom approximation at the end (Halko, Martinsson & Tropp, 2011; Tropp, Yurtsever,
Udell & Cevher, 2017, algorithm 3). A pass over the data multiplies all columns at once, through the factored rows:
``Y = sum_n Phi_n^T (Phi_n X)``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import LowRankPlusDiag
from curvlin._random import standard_normal
from curvlin.iterative.results import LowRankApproximation, exactly
from curvlin_nn.capture import Block, Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register


@register
class LowRank(Structure):
    """``H ~ U U^T`` from below, exact where the rank of H is at most `rank`.

    Args:
        space: all parameters.
        rank: the columns of U.
        oversampling: columns more that are multiplied.
        passes: over the data; all but the last turn the columns towards the leading eigenvectors.
        generator: source of randomness; None is torch's default generator.

    Raises:
        UnsupportedError: if a number is out of range.
    """

    name = "lowrank"
    restricts = True

    def __init__(
        self,
        space: ParameterSpace,
        *,
        rank: int = 100,
        oversampling: int = 10,
        passes: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(space)
        check_numbers(rank, oversampling, passes)
        self._rank, self._oversampling, self.passes, self._generator = rank, oversampling, passes, generator
        self._X: Tensor | None = None
        self._Y: Tensor | None = None
        self._trace: Tensor | None = None

    def begin(self, pass_index: int) -> None:
        """See `Structure.begin`."""
        if pass_index > 0:
            assert self._Y is not None
            self._X = _orthonormal(self._Y)
        self._Y = self._trace = None

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        Phi = features(captures)
        if self._X is None:
            width = min(self.space.size, self._rank + self._oversampling)
            like = torch.empty(0, dtype=torch.float64, device=Phi.device)
            noise = standard_normal((self.space.size, width), torch.Size(), self._generator, like)
            self._X = _orthonormal(noise)
        product = Phi.to(torch.float64)
        Y, trace = product.T @ (product @ self._X), _trace(captures)
        self._Y = Y if self._Y is None else self._Y + Y
        self._trace = trace if self._trace is None else self._trace + trace

    def check_merge(self, other: LowRank) -> None:
        """Not a sum of states: the columns of either were turned towards its own eigenvectors.

        Raises:
            UnsupportedError: always, unless `other` has seen nothing.
        """
        if other._Y is not None:
            raise UnsupportedError(
                "hessian_structure='lowrank' cannot be continued with other data; fit all data at once (override=True)"
            )

    def merge(self, other: LowRank) -> None:
        """See `Structure.merge`."""
        self.check_merge(other)

    def approximation(self) -> LowRankApproximation:
        """U, with the exact trace of what is left, ``tr(H - U U^T)``, which bounds every norm of it."""
        assert self._X is not None and self._Y is not None and self._trace is not None
        U = _nystrom(self._X, self._Y, self._rank)
        left = (self._trace - U.square().sum()).clamp(min=0.0)
        return LowRankApproximation(U, exactly(left, self._X.shape[1] * self.passes))

    def finish(self) -> LowRankPlusDiag:
        """See `Structure.finish`: ``0 + U U^T``, singular until a prior is added."""
        U = self.approximation().U
        return LowRankPlusDiag(U.new_zeros(len(U)), U)

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"X": self._X, "Y": self._Y, "trace": self._trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._X, self._Y, self._trace = state["X"], state["Y"], state["trace"]


def check_numbers(rank: int, oversampling: int, passes: int) -> None:
    """Whether these are numbers that the structure can work with.

    Raises:
        UnsupportedError: if one is out of range.
    """
    for name, value, least in (("rank", rank, 1), ("oversampling", oversampling, 0), ("passes", passes, 1)):
        if not isinstance(value, int) or value < least:
            raise UnsupportedError(f"{name} must be an integer of at least {least}, found {value!r}")


def _orthonormal(Y: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """Columns of the same span; contiguous, as they are in files: products of other layouts round otherwise."""
    return torch.linalg.qr(Y).Q.contiguous()


def _nystrom(X: Float[Tensor, "P K"], Y: Float[Tensor, "P K"], rank: int) -> Float[Tensor, "P rank"]:
    """U with ``U U^T`` the best approximation of this rank to ``Y (X^T Y)^+ Y^T``.

    Eigenvalues of the core below rounding stand for zero: Y has nothing in these directions but rounding.
    """
    core = X.mT @ Y
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > len(values) * torch.finfo(Y.dtype).eps * values.abs().max()
    if not bool(kept.any()):
        return Y.new_zeros(len(Y), 1)
    B = (Y @ vectors[:, kept]) * values[kept].rsqrt()
    U, s, _ = torch.linalg.svd(B, full_matrices=False)
    return U[:, :rank] * s[:rank]


def _trace(captures: Captures) -> Float[Tensor, ""]:
    """The squared norm of all rows."""
    traces = [_squared_norm(block) for block in captures.blocks]
    return torch.stack(traces).sum()


def _squared_norm(block: Block) -> Float[Tensor, ""]:
    left = block.left.double()
    if block.right is None:
        return left.square().sum()
    right = block.right.double()
    if left.shape[2] == 1:
        return (left.square().sum((1, 2, 3)) * right.square().sum((1, 2))).sum()
    # One sample's rows at a time.
    norms = [(a.mT @ b).square().sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(norms).sum()
