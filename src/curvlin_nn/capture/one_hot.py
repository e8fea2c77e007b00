"""Unit vectors that are held by the index of their one: the inputs of an embedding, of the length of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """One unit vector for each position.

    Attributes:
        index: where the one is; -1 stands for the zero vector.
        size: the length of the vectors.
    """

    index: Int[Tensor, "*positions"]
    size: int

    def of_samples(self, samples: slice | Int[Tensor, " n"]) -> OneHot:
        """Those of some entries of the first axis."""
        return OneHot(self.index[samples], self.size)

    def dense(self, like: Tensor) -> Float[Tensor, "*positions size"]:
        """The vectors, of the dtype and device of a tensor."""
        index = self.index.unsqueeze(-1)
        vectors = like.new_zeros(*self.index.shape, self.size)
        return vectors.scatter_(-1, index.clamp(min=0), (index >= 0).to(like.dtype))

    def times(self, M: Float[Tensor, "size d"]) -> Float[Tensor, "*positions d"]:
        """``vector^T M``: the rows of a matrix at the indices."""
        return torch.where((self.index >= 0).unsqueeze(-1), M[self.index.clamp(min=0)], 0.0)

    def summed(self, rows: Float[Tensor, "*positions d"]) -> Float[Tensor, "size d"]:
        """``sum_positions vector (x) row``: the rows of each index added up."""
        kept = self.index >= 0
        return rows.new_zeros(self.size, rows.shape[-1]).index_add_(0, self.index[kept], rows[kept])

    def counts(self) -> Float[Tensor, " size"]:
        """``sum_positions vector``, float64."""
        return torch.bincount(self.index[self.index >= 0], minlength=self.size).double()

    def padded(self, n_positions: int) -> OneHot:
        """With zero vectors behind the positions of the last axis."""
        missing = n_positions - self.index.shape[-1]
        return OneHot(torch.nn.functional.pad(self.index, (0, missing), value=-1), self.size)
