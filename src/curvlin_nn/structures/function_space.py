"""Function space: the exact matrix in its dual form, by the rows of all data; nothing is of size P x P.

The posterior of the linearised network is a Gaussian process with kernel ``J P0^-1 J^T`` seen at the training data
(Khan et al., 2019; Immer et al., 2021). Its covariance needs one system of as many equations as there are rows,
``I + S^T J P0^-1 J^T S / (sigma^2 T)`` with ``Lambda = S S^T``: whole output Hessians of any number of classes, and all
pairs of outputs of all pairs of samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlin import (
    BlockDiag,
    BlockFeatures,
    DenseFeatures,
    FeatureOperator,
    Isotropic,
    KhatriRaoFeatures,
    Woodbury,
)
from curvlin._plain import from_plain, to_plain
from curvlin_nn.capture import Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register


@register
class FunctionSpace(Structure):
    """``H = Phi^T Phi`` with the whitened rows ``Phi = S^T J`` of all data kept, in factored form.

    Equal to `Full`, for networks with more parameters than the data have rows. Memory: the rows, V columns and S_l
    positions of ``sum_l V S_l (in_l + out_l)`` numbers for each sample, and the square of their number, N V. A fit
    never looks at the data again.
    """

    name = "gp"

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self._batches: list[list[BlockFeatures]] = []  # of each batch, some columns at a time

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        if captures.first:
            self._batches.append([])
        self._batches[-1].append(features(captures))

    def check_merge(self, other: FunctionSpace) -> None:
        """See `Structure.check_merge`."""
        _check_blocks([*self._batches, *other._batches])

    def merge(self, other: FunctionSpace) -> None:
        """See `Structure.merge`."""
        self.check_merge(other)
        self._batches = [*self._batches, *other._batches]

    def finish(self) -> Woodbury:
        """See `Structure.finish`: ``0 + Phi^T Phi``, singular until a prior is added.

        Raises:
            UnsupportedError: if batches cut the parameters into different blocks.
        """
        _check_blocks(self._batches)
        Phi = _stacked([_side_by_side(parts) for parts in self._batches]).to(torch.float64)
        zero = torch.zeros((), dtype=torch.float64, device=Phi.device)
        base = BlockDiag([Isotropic(zero, size) for size in Phi.indices.sizes], Phi.indices)
        return Woodbury(base, Phi)

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"batches": [[to_plain(part) for part in parts] for parts in self._batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._batches = [[_features_of(part) for part in parts] for parts in state["batches"]]


def _features_of(plain: dict[str, Any]) -> BlockFeatures:
    found = from_plain(plain)
    assert isinstance(found, BlockFeatures)
    return found


def _check_blocks(batches: list[list[BlockFeatures]]) -> None:
    cuts = {part.indices for parts in batches for part in parts}
    if any(cut != next(iter(cuts)) for cut in cuts):
        raise UnsupportedError(
            "hessian_structure='gp' found parameters that are cut into other blocks from batch to batch, expected the "
            "same; use hessian_structure='full', or leave those parameters out with subset_of_weights"
        )


def _side_by_side(parts: list[BlockFeatures]) -> BlockFeatures:
    """The rows of one batch, given some columns at a time."""
    return _joined(parts, dim=1)


def _stacked(batches: list[BlockFeatures]) -> BlockFeatures:
    """The samples of several batches; where one has fewer rows or positions than another, it has zeros more."""
    most = max(Phi.n_rows for Phi in batches)
    return _joined(batches, dim=0, n_rows=most)


def _joined(several: list[BlockFeatures], dim: int, n_rows: int | None = None) -> BlockFeatures:
    """Features along the axis of samples (0), or of rows (1) of the same samples."""
    if len(several) == 1:
        return several[0]
    parts = [
        _joined_part(list(parts), dim, n_rows) for parts in zip(*(Phi.parts for Phi in several), strict=True)
    ]
    return BlockFeatures(parts, several[0].indices)


def _joined_part(parts: list[FeatureOperator], dim: int, n_rows: int | None) -> FeatureOperator:
    factored = [part for part in parts if isinstance(part, KhatriRaoFeatures)]
    if len(factored) < len(parts):
        rows = [part.to_dense() for part in parts]
        return DenseFeatures(torch.cat([_with_rows(row, n_rows, -2) for row in rows], dim=dim))
    n_positions = max(part.n_positions for part in factored)
    left = [_padded(_with_rows(part.left, n_rows, -3), n_positions) for part in factored]
    right = [_padded(part.right, n_positions) for part in factored]
    return KhatriRaoFeatures(torch.cat(left, dim=dim), right[0] if dim else torch.cat(right))


def _with_rows(tensor: Tensor, n_rows: int | None, axis: int) -> Tensor:
    """With rows of zeros up to `n_rows` along an axis counted from the right."""
    missing = 0 if n_rows is None else n_rows - tensor.shape[axis]
    return F.pad(tensor, (0, 0) * (-axis - 1) + (0, missing)) if missing else tensor


def _padded(tensor: Tensor, n_positions: int) -> Tensor:
    """With positions of zeros up to `n_positions` along the last axis but one."""
    return _with_rows(tensor, n_positions, -2)
