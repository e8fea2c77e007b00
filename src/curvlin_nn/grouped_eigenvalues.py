"""Eigenvalues of a curvature by the group of their prior precision: what a search for the best prior asks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.spectrum import Spectrum

BINS_PER_UNIT = 20
"""Bins of eigenvalues per unit of their logarithm; a search among them ends within a few percent of the maximum."""


@dataclass(frozen=True)
class GroupedEigenvalues:
    """The positive eigenvalues of H by the group of their prior precision; those of zero inform of nothing.

    Attributes:
        inverses: their inverses, group by group.
        counts: how many each stands for, or None for one.
        sizes: how many there are in each group.
    """

    inverses: Float[Tensor, " M"]
    counts: Float[Tensor, " M"] | None
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, spectrum: Spectrum, groups: Int[Tensor, " D"], n_groups: int) -> GroupedEigenvalues:
        """Those of a spectrum of which no block lies in two groups."""
        positive = spectrum.eigenvalues > 0
        values, groups = spectrum.eigenvalues[positive], groups[positive]
        sizes = torch.bincount(groups, minlength=n_groups)
        if len(sizes) > 1 and bool((groups.diff() < 0).any()):
            values = values[groups.argsort(stable=True)]
        return cls(values.reciprocal(), None, tuple(sizes.tolist()))

    def effective(self, precision: Float[Tensor, " K"], scale: Tensor) -> tuple[Tensor, Tensor]:
        """``gamma`` and ``B`` of each group, sums of ``s_i`` and ``s_i (1 - s_i)``.

        ``s_i = 1 / (1 + delta / (scale lambda_i))`` is what the data say of a direction, in units of a parameter.
        """
        ratios = precision / scale
        if len(self.sizes) > len(self.inverses) // 8:
            sizes = torch.tensor(self.sizes, device=ratios.device)
            share = (1 + self.inverses * ratios.repeat_interleave(sizes)).reciprocal()
            groups = torch.arange(len(sizes), device=ratios.device).repeat_interleave(sizes)
            parts = [share, share * (1 - share)]
            gamma, B = (torch.zeros_like(ratios).index_add(0, groups, self._counted(part)) for part in parts)
            return gamma, B
        gammas, bends = [], []
        counts = [None] * len(self.sizes) if self.counts is None else self.counts.split(self.sizes)
        for ratio, inverses, count in zip(ratios, self.inverses.split(self.sizes), counts, strict=True):
            share = (inverses * ratio).add_(1).reciprocal_()
            weighted = share if count is None else share * count
            gammas.append(weighted.sum())
            bends.append(weighted @ (1 - share))
        return torch.stack(gammas), torch.stack(bends)

    def _counted(self, values: Tensor) -> Tensor:
        return values if self.counts is None else values * self.counts

    @cached_property
    def binned(self) -> GroupedEigenvalues | None:
        """One for each bin of their logarithms, with its mean inverse; None where these are not many times fewer."""
        logs = self.inverses.log().mul_(BINS_PER_UNIT).floor_().long()
        logs -= logs.min() if len(logs) else 0
        width = int(logs.max()) + 1 if len(logs) else 1
        if 8 * width * len(self.sizes) > len(self.inverses):
            return None
        sizes = torch.tensor(self.sizes, device=logs.device)
        keys = logs + width * torch.arange(len(sizes), device=logs.device).repeat_interleave(sizes)
        counts = torch.bincount(keys, minlength=width * len(sizes)).double()
        sums = torch.bincount(keys, self.inverses, minlength=width * len(sizes))
        there = counts > 0
        per_group = there.view(len(sizes), width).sum(1)
        return GroupedEigenvalues((sums / counts)[there], counts[there], tuple(per_group.tolist()))


@dataclass(frozen=True)
class DampedEigenvalues:
    """The eigenvalues of a curvature that is not added to its prior; see `Spectrum.power`.

    Attributes:
        spectrum: the eigenvalues.
        groups: the group of the prior precision of each coordinate.
    """

    spectrum: Spectrum
    groups: Int[Tensor, " D"]
    binned: ClassVar[None] = None

    def effective(self, precision: Float[Tensor, " K"], scale: Tensor) -> tuple[Tensor, Tensor]:
        """See `GroupedEigenvalues.effective`."""
        ratios, power = self.spectrum.ratios(scale, precision[self.groups]), self.spectrum.power
        share = (ratios / (1 + ratios)).reshape(-1, len(self.groups))
        zeros = torch.zeros_like(precision)
        gamma = zeros.index_add(0, self.groups, power * share.sum(0))
        return gamma, zeros.index_add(0, self.groups, power**2 * (share * (1 - share)).sum(0))
