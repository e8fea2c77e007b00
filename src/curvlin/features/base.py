"""Feature operators: rows of features, some per sample, in the space that a precision operator acts on.

The exact Jacobian of a network is one, and so is whatever stands in for it. A subclass says in a few hooks
how its structure multiplies; arguments are checked here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating, same_kind
from curvlin._tree import Tree
from curvlin.errors import NotClosedError
from curvlin.index import Index, as_index

FeaturesT = TypeVar("FeaturesT", bound="FeatureOperator")


class FeatureOperator(Tree, ABC):
    """N samples with R rows each of D features, ``(N, R, D)``, in whatever form makes their products cheap.

    Immutable, a pytree, natively batched: operator batch dimensions stand left of N. Rows are multiplied out
    only where `to_dense` or `columns` asks for them.
    """

    # -- shape -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """N, the number of samples."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """R, the number of rows per sample (outputs of the network)."""

    @property
    @abstractmethod
    def size(self) -> int:
        """D, the number of features (parameters of the network)."""

    @property
    def shape(self) -> torch.Size:
        """``(*batch_shape, N, R, D)``."""
        return torch.Size([*self.batch_shape, self.n_samples, self.n_rows, self.size])

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{type(self).__name__}({shape}, dtype={self.dtype}, device={self.device})"

    # -- products --------------------------------------------------------------------------------------------

    def __matmul__(self, v: Float[Tensor, "... D *K"]) -> Float[Tensor, "... N R *K"]:
        """``Phi v`` (a JVP): a 1-D tensor is a vector, anything else is ``(..., D, K)``.

        Raises:
            TypeError: if `v` is not a floating tensor of the dtype of the features.
            ValueError: if `v` does not have D rows.
        """
        self._check_operand("v", v, 1)
        was_vector = v.ndim == 1
        v = v.unsqueeze(-1) if was_vector else v
        if v.shape[-2] != self.size:
            raise ValueError(
                f"v must have {self.size} rows, as ({self.size},) or (..., {self.size}, K); found shape "
                f"{tuple(v.shape[:-1] if was_vector else v.shape)}"
            )
        broadcastable("v", v.shape[:-2], self.batch_shape)
        product = self._matmul(v)
        return product.squeeze(-1) if was_vector else product

    @property
    def T(self) -> FeatureTranspose:
        """The transpose: ``Phi.T @ u`` (a VJP) sums over samples and rows."""
        return FeatureTranspose(self)

    def gram(self, Psi: FeatureOperator | None = None) -> Float[Tensor, "*batch N R M Q"]:
        """``Phi Psi^T`` between all samples (``Psi = Phi`` if None): the tangent kernel if Phi is a Jacobian.

        Raises:
            NotClosedError: if the two kinds of features have no product that leaves both as they are.
        """
        if Psi is None:
            own = self._gram(self)
            assert own is not None  # every kind knows itself
            return (own + own.movedim((-4, -3), (-2, -1))) / 2
        same_features("Psi", Psi, self.size, next(self._tensors())[0], self.batch_shape)
        if (cross := self._gram(Psi)) is not None:
            return cross
        if (cross := Psi._gram(self)) is not None:
            return cross.movedim((-4, -3), (-2, -1))
        raise NotClosedError(
            f"{type(self).__name__} and {type(Psi).__name__} have no structured product; "
            "use DenseFeatures(Psi.to_dense()) if its N R D entries are affordable"
        )

    def __rmatmul__(self: FeaturesT, S: Float[Tensor, "... Q R"]) -> FeaturesT:
        """``S @ Phi``: rows mixed within each sample, by one matrix ``(Q, R)`` or by ``(N, Q, R)``.

        Weighting rows by the square roots of likelihood weights is such a product.
        """
        if not isinstance(S, Tensor):
            return NotImplemented
        self._check_operand("S", S, 2)
        if S.shape[-1] != self.n_rows or (S.ndim > 2 and S.shape[-3] not in (1, self.n_samples)):
            raise ValueError(
                f"S must have shape (Q, {self.n_rows}) or (..., {self.n_samples}, Q, {self.n_rows}), "
                f"found {tuple(S.shape)}"
            )
        broadcastable("S", S.shape[:-3], self.batch_shape)
        return self._mix(S)

    def __mul__(self: FeaturesT, c: float | Tensor) -> FeaturesT:
        """``c Phi`` for a number c (or a 0-dim tensor, or one per batch element)."""
        if isinstance(c, (int, float)):
            c = torch.tensor(float(c), dtype=self.dtype, device=self.device)
        if not isinstance(c, Tensor):
            return NotImplemented
        self._check_operand("the scale of features", c, 0)
        broadcastable("the scale of features", c.shape, self.batch_shape)
        return self._scale(c)

    __rmul__ = __mul__

    # -- parts -----------------------------------------------------------------------------------------------

    def __getitem__(self: FeaturesT, samples: slice | Tensor) -> FeaturesT:
        """The samples of a slice, or of a tensor of integers, in that order."""
        if isinstance(samples, slice):
            chosen = range(self.n_samples)[samples]
            if len(chosen) == 0:
                raise ValueError(f"{samples} selects none of the {self.n_samples} samples")
            if chosen.step == 1:
                return self._select(slice(chosen.start, chosen.stop))
            return self._select(torch.tensor(chosen, device=self.device))
        if isinstance(samples, Tensor) and samples.ndim == 1 and samples.dtype == torch.long:
            return self._select(samples)
        raise TypeError(
            f"samples are selected by a slice or a 1-D LongTensor, found {type(samples).__name__}; "
            "for one sample use Phi[n : n + 1]"
        )

    def columns(self, index: Index) -> Float[Tensor, "*batch N R k"]:
        """The features named by `index`, in that order, as a tensor."""
        return self._columns(as_index(index, self.size, self.device))

    @abstractmethod
    def flatten(self: FeaturesT) -> FeaturesT:
        """The same rows, sample-major, as samples of one row each: ``(N * R, 1, D)``."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "*batch N R D"]:
        """The rows themselves, with all their ``N R D`` entries."""

    # -- hooks: what a structure has to say ------------------------------------------------------------------

    @abstractmethod
    def _matmul(self, v: Tensor) -> Tensor:
        """``(..., D, K) -> (..., N, R, K)``."""

    @abstractmethod
    def _rmatmul(self, u: Tensor) -> Tensor:
        """``(..., N, R, K) -> (..., D, K)``."""

    @abstractmethod
    def _gram(self, Psi: FeatureOperator) -> Tensor | None:
        """``(..., N, R, M, Q)``, or None if this kind does not know Psi's kind."""

    @abstractmethod
    def _mix(self: FeaturesT, S: Tensor) -> FeaturesT:
        """``S @ Phi``."""

    @abstractmethod
    def _scale(self: FeaturesT, c: Tensor) -> FeaturesT:
        """``c Phi``."""

    @abstractmethod
    def _select(self: FeaturesT, samples: slice | Tensor) -> FeaturesT:
        """The chosen samples."""

    @abstractmethod
    def _columns(self, index: Tensor) -> Tensor:
        """``(..., N, R, len(index))``."""

    def _check_operand(self, name: str, value: Tensor, ndim: int) -> None:
        floating(name, value, ndim=ndim, like=next(self._tensors())[0])


class FeatureTranspose:
    """``Phi^T``, for ``Phi.T @ u``."""

    def __init__(self, features: FeatureOperator) -> None:
        self._features = features

    @property
    def T(self) -> FeatureOperator:
        """The features again."""
        return self._features

    def __matmul__(self, u: Float[Tensor, "... N R *K"]) -> Float[Tensor, "... D *K"]:
        """``Phi^T u`` (a VJP): a 2-D tensor is ``(N, R)``, anything else is ``(..., N, R, K)``.

        Raises:
            TypeError: if `u` is not a floating tensor of the dtype of the features.
            ValueError: if its shape is not that of the rows.
        """
        Phi = self._features
        Phi._check_operand("u", u, 2)
        was_vector = u.ndim == 2
        u = u.unsqueeze(-1) if was_vector else u
        if u.shape[-3:-1] != (Phi.n_samples, Phi.n_rows):
            rows = f"{Phi.n_samples}, {Phi.n_rows}"
            raise ValueError(
                f"u must have shape ({rows}) or (..., {rows}, K), found "
                f"{tuple(u.shape[:-1] if was_vector else u.shape)}"
            )
        broadcastable("u", u.shape[:-3], Phi.batch_shape)
        product = Phi._rmatmul(u)
        return product.squeeze(-1) if was_vector else product


def same_features(name: str, Phi: object, size: int, like: Tensor, batch: torch.Size) -> None:
    """Phi is a feature operator over `size` coordinates, of `like`'s dtype and device, that meets this batch.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if not isinstance(Phi, FeatureOperator):
        raise TypeError(
            f"{name} must be a FeatureOperator, found {type(Phi).__name__}; wrap it in DenseFeatures"
        )
    if Phi.size != size:
        raise ValueError(f"{name} must have {size} features per row, found shape {tuple(Phi.shape)}")
    same_kind(name, next(Phi._tensors())[0], like)
    broadcastable(name, Phi.batch_shape, batch)
