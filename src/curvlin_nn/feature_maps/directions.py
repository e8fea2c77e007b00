"""K directions V in the space of weights, in the form that takes less memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import BlockFeatures, FeatureOperator


class Directions(ABC):
    """V of shape ``(P, K)``."""

    @property
    @abstractmethod
    def size(self) -> int:
        """K."""

    @abstractmethod
    def features(self, J: FeatureOperator) -> Float[Tensor, "N C K"]:
        """``J V`` in the dtype of J; no row of J is multiplied out."""

    @abstractmethod
    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "K S"]:
        """``V^T weights``."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What V is made of, by name."""


@dataclass(frozen=True)
class FlatDirections(Directions):
    """K flat vectors: a product costs what K forward passes through the layers do, ``P K`` numbers of memory.

    Attributes:
        V: the vectors.
    """

    V: Float[Tensor, "P K"]

    @property
    def size(self) -> int:
        """See `Directions.size`."""
        return self.V.shape[1]

    def features(self, J: FeatureOperator) -> Float[Tensor, "N C K"]:
        """See `Directions.features`."""
        return J @ self.V.to(J.dtype)

    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "K S"]:
        """See `Directions.project`."""
        return self.V.to(weights.dtype).mT @ weights

    def tensors(self) -> Mapping[str, Tensor]:
        """See `Directions.tensors`."""
        return {"V": self.V}


@dataclass(frozen=True)
class SpannedDirections(Directions):
    """``V = J_M^T U``, kept as the M rows of a Jacobian in factored form: products are Gram matrices with these.

    Columns that U makes orthonormal are so up to the rounding of ``J_M J_M^T``: the better, the larger the eigenvalue.

    Attributes:
        rows: of J_M, batch by batch, in float64 where products are asked for.
        U: their coefficients, the batches' one after another, float64.
    """

    rows: Sequence[BlockFeatures]
    U: Float[Tensor, "M K"]

    @property
    def size(self) -> int:
        """See `Directions.size`."""
        return self.U.shape[1]

    def features(self, J: FeatureOperator) -> Float[Tensor, "N C K"]:
        """See `Directions.features`."""
        exact = J.to(self.U.dtype)  # rounding grows by the condition number of U
        total = torch.zeros(*J.shape[:2], self.size, dtype=exact.dtype, device=J.device)
        for Psi, U in self._batches():
            total += exact.gram(Psi).flatten(2) @ U
        return total.to(J.dtype)

    def project(self, weights: Float[Tensor, "P S"]) -> Float[Tensor, "K S"]:
        """See `Directions.project`."""
        total = torch.zeros(self.size, weights.shape[1], dtype=self.U.dtype, device=weights.device)
        for Psi, U in self._batches():
            total += U.mT @ (Psi @ weights.to(U.dtype)).flatten(0, 1)
        return total.to(weights.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """See `Directions.tensors`."""
        rows = {
            f"rows.{b}.{i}": tensor
            for b, Psi in enumerate(self.rows)
            for i, (tensor, _) in enumerate(Psi._tensors())
        }
        return {**rows, "U": self.U}

    def orthonormal_basis(self) -> FlatDirections:
        """An orthonormal basis of the same directions as flat vectors."""
        V = torch.zeros(self.rows[0].size, self.size, dtype=self.U.dtype, device=self.U.device)
        for Psi, U in self._batches():
            V += Psi.to(U.dtype).T @ U.unflatten(0, (Psi.n_samples, Psi.n_rows))
        return FlatDirections(torch.linalg.qr(V).Q)

    def cheaper(self) -> Directions:
        """The form of fewer numbers, which is that of fewer multiplications too."""
        own = sum(tensor.numel() for tensor in self.tensors().values())
        if self.rows[0].size * self.size <= own:
            return self.orthonormal_basis()
        return SpannedDirections([Psi.to(self.U.dtype) for Psi in self.rows], self.U)

    def _batches(self) -> Iterator[tuple[BlockFeatures, Tensor]]:
        counts = [Psi.n_samples * Psi.n_rows for Psi in self.rows]
        return zip(self.rows, self.U.split(counts), strict=True)
