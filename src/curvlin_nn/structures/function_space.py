"""The exact posterior in its dual form: the whitened Jacobian of the data is kept, and nothing of size P x P is made.

    H = Phi^T Phi,   Phi = (Lambda_n^(1/2) J_n)_n   with one row for each column that a sample sends backward

With an isotropic (or diagonal) prior P is a Woodbury over Phi, whose system has the rows of Phi for its size: the
function space (Gaussian process) view of the linearised model (Khan et al., 2019; Immer et al., 2021), with the
curvature of a softmax as it is, not its diagonal. Predictions visit the kept rows, never the data.

Memory is that of the factored rows, ``N V sum(S out)`` and ``N sum(S in)`` numbers; the Gram matrix has ``(N V)^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curvlin import Isotropic, Woodbury
from curvlin._check import positive_integer
from curvlin_nn.capture import Block, Captures
from curvlin_nn.capture.blocks import stacked
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register


@dataclass(frozen=True)
class _Part:
    """Some samples' rows, with the number of each sample in a random order."""

    rank: Float[Tensor, " N"]
    blocks: tuple[Block, ...]

    def of_samples(self, samples: Int[Tensor, " n"]) -> _Part:
        return _Part(self.rank[samples.cpu()], tuple(block.of_samples(samples) for block in self.blocks))


@register
class FunctionSpace(Structure):
    """``Phi^T Phi`` with the rows of all data, or of a random subset of it.

    Args:
        space: all parameters.
        n_subset: how many samples to keep, each as likely as any other; None keeps all. The posterior is then that of
            the subset, as if the other data did not exist (the evidence still counts all of their likelihood).
        generator: source of randomness for the subset; None is torch's default generator.
    """

    name = "gp"

    def __init__(
        self,
        space: ParameterSpace,
        *,
        n_subset: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(space)
        self._n_subset = None if n_subset is None else positive_integer("n_subset", n_subset)
        self._generator = generator
        self._parts: list[_Part] = []
        self._of_batch: Int[Tensor, " n"] | None = None  # the samples of the last batch that are kept

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        blocks = tuple(replace(block, uses=()) for block in captures.blocks)
        if not captures.first:
            self._parts[-1:] = _with_more_columns(self._parts[-1:], blocks, self._of_batch)
            return
        self._check_places(blocks)
        rank = torch.zeros(captures.n_samples, dtype=torch.float64)
        if self._n_subset is not None:
            rank = torch.rand(captures.n_samples, dtype=torch.float64, generator=self._generator)
        self._parts.append(_Part(rank, blocks))
        self._of_batch = self._thin_out()

    def _thin_out(self) -> Int[Tensor, " n"] | None:
        """Keep the samples that come first in the random order; returns which of the last part these are."""
        if self._n_subset is None:
            return None
        ranks = torch.cat([part.rank for part in self._parts])
        last = len(self._parts[-1].rank)
        if len(ranks) <= self._n_subset:
            return torch.arange(last)
        kept = torch.zeros(len(ranks), dtype=torch.bool)
        kept[ranks.argsort()[: self._n_subset]] = True
        chosen = [mine.nonzero().squeeze(1) for mine in kept.split([len(part.rank) for part in self._parts])]
        self._parts = [
            part if len(samples) == len(part.rank) else part.of_samples(samples)
            for part, samples in zip(self._parts, chosen, strict=True)
            if len(samples) or part is self._parts[-1]
        ]
        return chosen[-1]

    def _check_places(self, blocks: Sequence[Block]) -> None:
        if self._parts and [b.place for b in self._parts[0].blocks] != [b.place for b in blocks]:
            raise UnsupportedError(
                "a weight was used in parts of other shapes than in earlier data, expected the same in every batch for "
                "hessian_structure='gp'"
            )

    def check_merge(self, other: FunctionSpace) -> None:
        """See `Structure.check_merge`.

        Raises:
            UnsupportedError: for subsets of different sizes, or other parts of a weight.
        """
        if self._n_subset != other._n_subset:
            raise UnsupportedError(
                f"hessian_structure='gp' cannot merge subsets of {self._n_subset} and {other._n_subset} samples; give "
                "both the same n_subset"
            )
        if other._parts:
            self._check_places(other._parts[0].blocks)

    def merge(self, other: FunctionSpace) -> None:
        """See `Structure.merge`."""
        self.check_merge(other)
        if other._parts:
            self._parts += other._parts
            self._thin_out()

    def finish(self) -> Woodbury:
        """See `Structure.finish`: ``0 + Phi^T Phi``, singular until a prior is added."""
        parts = [part.blocks for part in self._parts if len(part.rank)]
        n_columns = max(blocks[0].left.shape[1] for blocks in parts)
        padded = [[_padded(block, n_columns) for block in blocks] for blocks in parts]
        blocks = tuple(stacked(uses) for uses in zip(*padded, strict=True))
        Phi = features(Captures(len(blocks[0].left), blocks)).to(torch.float64)
        return Woodbury(Isotropic(torch.zeros((), dtype=torch.float64, device=Phi.device), Phi.size), Phi)

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        parts = [
            {"rank": part.rank, "blocks": [_plain(block) for block in part.blocks]} for part in self._parts
        ]
        return {"parts": parts, "of_batch": self._of_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._parts = [
            _Part(part["rank"].cpu(), tuple(Block(**block) for block in part["blocks"]))
            for part in state["parts"]
        ]
        self._of_batch = state["of_batch"]


def _plain(block: Block) -> dict[str, Any]:
    """The fields of a block; `uses` has none here."""
    own = {field.name: getattr(block, field.name) for field in fields(Block) if field.name != "uses"}
    return {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in own.items()}


def _with_more_columns(
    parts: Sequence[_Part], blocks: Sequence[Block], samples: Int[Tensor, " n"] | None
) -> list[_Part]:
    """The last part with further columns of the same samples, of which only some are kept."""
    (part,) = parts
    more = blocks if samples is None else [block.of_samples(samples) for block in blocks]
    both = [
        replace(mine, left=torch.cat([mine.left, new.left], dim=1))
        for mine, new in zip(part.blocks, more, strict=True)
    ]
    return [replace(part, blocks=tuple(both))]


def _padded(block: Block, n_columns: int) -> Block:
    """With rows of zeros where other samples have more columns."""
    return replace(block, left=F.pad(block.left, (0, 0, 0, 0, 0, n_columns - block.left.shape[1])))
