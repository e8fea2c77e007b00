"""What a surrogate's kernel is compared with, batch by batch: the exact one, its leading part, or a random estimate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlin import BlockFeatures
from curvlin_nn.errors import OutputError
from curvlin_nn.feature_maps.jacobian import JacobianMap, rows_of_outputs
from curvlin_nn.feature_maps.kernel_loss import distance_to_factors, distance_to_gram
from curvlin_nn.feature_maps.leading import leading_directions
from curvlin_nn.feature_maps.pool import Pool, joined
from curvlin_nn.feature_maps.probes import gram_by_products, probed
from curvlin_nn.feature_maps.projected import ROW_BUDGET

N_FOR_DIRECTIONS = 640
"""Samples of each pool that the leading directions are found on."""


class KernelTargets(ABC):
    """The distance of ``F F^T`` from the tangent kernel of a batch, rows weighted, in one of several forms."""

    @abstractmethod
    def distance(
        self,
        F: Float[Tensor, "R K"],
        weights: Float[Tensor, " R"],
        batch: Sequence[tuple[Pool, Int[Tensor, " n"]]],
        groups: Sequence[int],
        where: str,
    ) -> Float[Tensor, ""]:
        """``|W (kernel - F F^T) W|_F^2``, differentiable in F, with the blocks between `groups` of the kernel zero.

        Args:
            F: features of all samples of the batch.
            weights: the diagonal of W.
            batch: the samples by their pools.
            groups: as in `distance_to_factors`.
            where: what to call the batch in messages.
        """


class ExactTargets(KernelTargets):
    """The exact kernel of each batch, layer by layer."""

    def __init__(self, jacobian: JacobianMap) -> None:
        self._jacobian = jacobian

    def distance(
        self,
        F: Tensor,
        weights: Tensor,
        batch: Sequence[tuple[Pool, Tensor]],
        groups: Sequence[int],
        where: str,
    ) -> Tensor:
        """See `KernelTargets.distance`."""
        J = rows_of_outputs(self._jacobian.record(inputs(batch), where))
        gram = J.gram().flatten(2).flatten(0, 1).to(F.dtype)
        return distance_to_gram(weights[:, None] * F, weights[:, None] * gram * weights, groups)


class ProbedTargets(KernelTargets):
    """Random probes, new ones for each batch: unbiased, and as noisy as they are few."""

    def __init__(self, model: nn.Module, jacobian: JacobianMap, n_probes: int, g: torch.Generator) -> None:
        self._model, self._space, self._n_probes, self._generator = model, jacobian.space, n_probes, g

    def distance(
        self,
        F: Tensor,
        weights: Tensor,
        batch: Sequence[tuple[Pool, Tensor]],
        groups: Sequence[int],
        where: str,
    ) -> Tensor:
        """See `KernelTargets.distance`."""
        Y = probed(self._model, self._space, inputs(batch), self._n_probes, self._generator, where)
        return distance_to_factors(weights[:, None] * F, weights[:, None] * Y.to(F.dtype), groups)


class DistilledTargets(KernelTargets):
    """The kernel in its leading K directions on the pools: ``Y = J V``, computed once for every sample.

    ``N C K`` numbers of memory; a step costs what the surrogate costs.

    Args:
        jacobian: J.
        pools: whose samples batches are of.
        weights: of the rows of each pool.
        rank: K.
        generator: source of randomness.
    """

    def __init__(
        self,
        jacobian: JacobianMap,
        pools: Sequence[Pool],
        weights: Sequence[float],
        rank: int,
        generator: torch.Generator,
    ) -> None:
        self._pools = pools

        def rows() -> Iterator[BlockFeatures]:
            for pool, weight in zip(pools, weights, strict=True):
                for J in _rows(jacobian, pool, min(pool.size, N_FOR_DIRECTIONS)):
                    yield J * weight

        self.directions = leading_directions(rows, rank, generator=generator)
        self._known = [
            torch.cat([self.directions.features(J) for J in _rows(jacobian, pool, pool.size)])
            for pool in pools
        ]

    def examples(self, pool: Pool, size: int) -> Iterator[tuple[Any, Float[Tensor, "n C K"]]]:
        """The inputs of a pool with their features, some at a time."""
        known = self._known[self._number(pool)]
        yield from zip(pool.batches(size), known.split(size), strict=True)

    def distance(
        self,
        F: Tensor,
        weights: Tensor,
        batch: Sequence[tuple[Pool, Tensor]],
        groups: Sequence[int],
        where: str,
    ) -> Tensor:
        """See `KernelTargets.distance`."""
        Y = torch.cat([self._known[self._number(pool)][index.to(F.device)] for pool, index in batch])
        return distance_to_factors(
            weights[:, None] * F, weights[:, None] * Y.flatten(0, 1).to(F.dtype), groups
        )

    def _number(self, pool: Pool) -> int:
        return next(number for number, own in enumerate(self._pools) if own is pool)


def inputs(batch: Sequence[tuple[Pool, Int[Tensor, " n"]]]) -> Any:
    """The inputs of samples from several pools as one."""
    return joined([(pool[index], len(index)) for pool, index in batch], "the batch")


def exact_gram(
    model: nn.Module, jacobian: JacobianMap, pool: Pool, by_layers: bool, where: str
) -> Float[Tensor, "R R"]:
    """The kernel of all samples of a pool: layer by layer, or by products with the Jacobian.

    Raises:
        OutputError: if it is not finite, or zero.
    """
    if by_layers:
        gram = rows_of_outputs(jacobian.record(pool.x, where)).gram().flatten(2).flatten(0, 1)
    else:
        gram = gram_by_products(model, jacobian.space, pool.x, where)
    trace = float(gram.diagonal().sum())
    if not (math.isfinite(trace) and trace > 0):
        raise OutputError(
            f"the tangent kernel on {where} must be finite and not zero, found a trace of {trace}"
        )
    return gram


def _rows(jacobian: JacobianMap, pool: Pool, n_samples: int) -> Iterator[BlockFeatures]:
    """The Jacobian at the first samples of a pool, as many at a time as memory is meant for."""
    chunk, start = 1, 0
    while start < n_samples:
        stop = min(start + chunk, n_samples)
        J = rows_of_outputs(jacobian.record(pool[start:stop], f"samples {start} to {stop - 1}"))
        chunk = max(1, ROW_BUDGET * (stop - start) // sum(t.numel() for t, _ in J._tensors()))
        start = stop
        yield J
